import pytest

from .tiny import tiny_model


@pytest.fixture(params=["llama", "qwen3"])
def model(request):
    return tiny_model(request.param)
