"""`graft report RUN`: all that a run directory holds, as one HTML page with a viewer of its rounds."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from vl_convert import javascript_bundle

from graft_inference import METHODS, GraftError, Policy, ScoredPlan
from graft_train.calibrate.latency import read_latency
from graft_train.calibrate.measure import TRACE_FILES
from graft_train.calibrate.texts import TEXTS, read_texts
from graft_train.calibrate.trace_file import read_traces
from graft_train.chat import STYLES
from graft_train.files import told, write_text
from graft_train.inspect import in_words
from graft_train.report.rounds import shown_rounds
from graft_train.report.sections import OTHER_VERSION, sections_of
from graft_train.run_directory import RunDirectory

HERE = Path(__file__).parent


def report(place: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page; what is missing of the run is named on it.

    Args:
        place: the run_dir of a run.
        out: the page; None is report.html in the run.

    Raises:
        GraftError: no run, or no place that can be written.
    """
    run = RunDirectory.open(place)
    path = Path(out) if out is not None else run.path / "report.html"
    if not path.parent.is_dir():
        raise GraftError(f"there is no directory {path.parent} for {path.name}: make it first, or name another place")
    page = render(run)
    with told(path.parent):
        write_text(path, page)
    return path


def render(run: RunDirectory) -> str:
    """The page's HTML, with all that it needs."""
    try:
        viewer: Any = viewer_of(run)
    except GraftError as error:
        viewer = str(error)
    except OTHER_VERSION as error:
        viewer = f"What is there has another shape ({error!r}), as of another version: run graft calibrate again."
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    environment.policies["json.dumps_kwargs"] = {}  # methods and phases stay in their order
    scripts = [_bundle(), (HERE / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("page.html.jinja").render(
        run=run,
        sections=sections_of(run, viewer),
        viewer=None if isinstance(viewer, str) else viewer,
        style=_own((HERE / "page.css").read_text(encoding="utf-8")),
        scripts=[_own(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        plots=[],
    )


def _own(text: str) -> Markup:
    """Text of this package or of Vega's, which is not escaped; nothing of a run is in it."""
    return Markup(text)  # nosec B704


def viewer_of(run: RunDirectory) -> dict[str, Any]:
    """The rounds of the traced answers, as JSON values.

    Raises:
        GraftError: no policy, or traces without text.
    """
    directory = run.directory("policy")
    policy = Policy.from_dict(run.read("policy", "policy.json"))
    if not (directory / TEXTS).is_file():
        raise GraftError(
            f"the traces have no text, as of an earlier version: delete {directory} and run graft calibrate"
        )
    latency = read_latency(directory / "latency.json", f"delete {directory} and run graft calibrate")
    shares = {False, *(policy.plan(name).shares_noise for name in METHODS)}
    traces = {shared: read_traces(directory / TRACE_FILES[shared], {}) for shared in shares}
    answers, spelled = read_texts(directory / TEXTS, traces[False])
    plans = {name: policy.plan(name) for name in METHODS}
    return {
        "hues": STYLES,
        "methods": {
            name: {"words": in_words(plan), "scored": isinstance(plan, ScoredPlan)} for name, plan in plans.items()
        },
        "answers": shown_rounds(plans, latency, traces, answers, spelled),
    }


def _bundle() -> str:
    """Vega, Vega-Lite and vega-embed, as one script."""
    script: str = javascript_bundle()  # type: ignore[call-arg]  # its stub knows no default
    return script


def _hash(script: str) -> str:
    """Of a script that the page may run; no other is."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
