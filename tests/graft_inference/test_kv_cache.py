import pytest
import torch

from graft_inference.target.kv_cache import TreeCache

LAYERS, HEADS, WIDTH = 2, 3, 4


def rows(first: int, count: int) -> torch.Tensor:
    """Recognisable keys: row r of head h is full of 10 h + r. [1, HEADS, count, WIDTH]"""
    row_S = torch.arange(first, first + count, dtype=torch.float32)
    head_B = 100 * torch.arange(HEADS, dtype=torch.float32)
    return (head_B[:, None] + row_S)[None, :, :, None].expand(-1, -1, -1, WIDTH).clone()


def write(cache: TreeCache, first: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One forward pass: every layer gets keys, their negatives as values, and a shift of its own."""
    return [
        cache.update(rows(first, count) + 1000 * layer, -rows(first, count) - 1000 * layer, layer)
        for layer in range(LAYERS)
    ]


def commit_branch(cache: TreeCache, path: list[int]) -> None:
    """As a round does."""
    cache.keep_branch(torch.tensor(path))
    cache.commit(len(path))


def content(cache: TreeCache, layer: int = 0) -> list[int]:
    """First head's committed rows."""
    return cache.layers[layer].keys[0, 0, : cache.length, 0].int().tolist()


def test_rows_are_visible_when_written_and_kept_when_committed():
    cache = TreeCache(LAYERS, 10)
    keys, values = write(cache, 0, 3)[1]
    assert torch.equal(keys, rows(0, 3) + 1000)
    assert torch.equal(values, -rows(0, 3) - 1000)
    assert cache.length == 0
    cache.commit(3)
    assert cache.length == cache.get_seq_length() == 3
    assert content(cache) == [0, 1, 2]


def test_what_is_not_committed_is_overwritten():
    cache = TreeCache(LAYERS, 10)
    write(cache, 0, 3)
    cache.commit(2)
    keys, _ = write(cache, 50, 4)[0]
    assert keys[0, 0, :, 0].int().tolist() == [0, 1, 50, 51, 52, 53]


@pytest.mark.parametrize(
    "path", [[0], [0, 1, 2], [0, 2, 3], [0, 1, 4], [0, 3, 4], [0, 4]], ids=lambda path: "-".join(map(str, path))
)
def test_a_branch_moves_behind_the_committed_rows(path):
    cache = TreeCache(LAYERS, 10)
    write(cache, 0, 2)
    cache.commit(2)
    write(cache, 50, 5)
    commit_branch(cache, path)
    for layer in range(LAYERS):
        expected = [0, 1, *(50 + row for row in path)]
        assert content(cache, layer) == [1000 * layer + row for row in expected]
        valid = slice(0, cache.length)
        assert torch.equal(cache.layers[layer].values[:, :, valid], -cache.layers[layer].keys[:, :, valid])
        head_2 = cache.layers[layer].keys[0, 2, valid, 0] - cache.layers[layer].keys[0, 0, valid, 0]
        assert (head_2 == 200).all()


def test_buffers_are_allocated_once():
    cache = TreeCache(LAYERS, 12)
    write(cache, 0, 2)
    cache.commit(2)
    buffer = cache.layers[0].keys.data_ptr()
    for _ in range(3):
        write(cache, 50, 4)
        commit_branch(cache, [0, 2])
    assert cache.layers[0].keys.data_ptr() == buffer
    assert cache.length == 8


def test_rewind_forgets_everything():
    cache = TreeCache(LAYERS, 6)
    write(cache, 0, 5)
    cache.commit(5)
    cache.rewind()
    assert cache.length == 0
    keys, _ = write(cache, 70, 2)[0]
    assert keys[0, 0, :, 0].int().tolist() == [70, 71]


def test_masks_cover_committed_and_new_rows():
    cache = TreeCache(LAYERS, 10)
    write(cache, 0, 4)
    cache.commit(4)
    assert cache.layers[0].get_mask_sizes(3) == (7, 0)
    assert cache.layers[0].get_max_length() == 10


def test_more_rows_than_there_is_room_for_fail_loudly():
    cache = TreeCache(LAYERS, 4)
    write(cache, 0, 3)
    cache.commit(3)
    with pytest.raises(RuntimeError):
        write(cache, 3, 2)


def test_layers_of_another_shape_have_a_buffer_of_their_own():
    """As layers on another device have; commit and growth reach all of them."""
    cache = TreeCache(LAYERS, 8)

    def write_both(first: int, count: int) -> None:
        states = rows(first, count)
        cache.update(states, -states, 0)
        cache.update(states[:, :1], -states[:, :1, :, :2], 1)

    write_both(0, 2)
    cache.commit(2)
    write_both(50, 5)
    commit_branch(cache, [0, 2, 4])
    cache.grow(12)
    write_both(70, 4)
    commit_branch(cache, [0, 3])
    for layer, (heads, width) in enumerate(((HEADS, WIDTH), (1, 2))):
        assert content(cache, layer) == [0, 1, 50, 52, 54, 70, 73]
        assert cache.layers[layer].values.shape == (1, heads, 12, width)
        values = cache.layers[layer].values[0, 0, : cache.length, 0]
        assert values.int().tolist() == [0, -1, -50, -52, -54, -70, -73]
