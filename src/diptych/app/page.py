"""The page itself: its tabs, what they ask, and which functions answer. Needs gradio.

What is asked of one network waits in one queue (`concurrency_id`), whose length the page shows. Answers with text of
users or of networks are HTML of `answers.py`, which escapes it.
"""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import gradio as gr
from fastapi import FastAPI

from diptych.app import answers
from diptych.app.runs import GivenRun, networks, tabs_of
from diptych.app.serve import MAX_FILE_MB, WAITING

_BATCH = 16
"""Largest number of requests that a network answers together."""
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
_MONO = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def build(runs: Sequence[GivenRun]) -> gr.Blocks:
    """The page with the tabs that the runs give it."""
    wanted = tabs_of(runs)
    with gr.Blocks(title="Diptych", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML('<h1 class="name">Diptych</h1>', padding=False)
        with gr.Tabs():
            for tab in wanted:
                with gr.Tab(tab, render_children=True):
                    _TABS[tab](runs)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return page


def mount(app: FastAPI, page: gr.Blocks) -> FastAPI:
    """``app`` with the page at its root: nothing is sent from other folders, and nothing is asked of other machines."""
    theme = gr.themes.Default(
        primary_hue="blue",
        font=[gr.themes.Font(name) for name in _FONTS],
        font_mono=[gr.themes.Font(name) for name in _MONO],
    )
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        max_file_size=f"{MAX_FILE_MB}mb",
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme,
        css=_css(),
    )


def _css() -> str:
    """The style of reports, for what the page shows of them alone, and that of the page."""
    report = (files("diptych.report") / "style.css").read_text(encoding="utf-8")
    return f".shown {{\n{report}}}\n" + (files("diptych.app") / "page.css").read_text(encoding="utf-8")


def _choice_of_run(found: dict[str, Any]) -> gr.Dropdown:
    """Which run answers; hidden where there is one."""
    return gr.Dropdown(list(found), value=next(iter(found)), label="Run", visible=len(found) > 1)


def _caption(runs: Sequence[GivenRun]) -> None:
    found = networks(runs, "itit")

    def answer(names: list[str], given: list[list[str] | None], beams: list[int]) -> list[list[str]]:
        """A batch of requests: a list for each input and for each output."""
        shown = [""] * len(names)
        for name, diptych in found.items():
            rows = [row for row, asked in enumerate(names) if asked == name]
            for row, text in zip(
                rows, answers.captions(diptych, [(given[r], int(beams[r])) for r in rows]), strict=True
            ):
                shown[row] = text
        return [shown]

    with gr.Row():
        with gr.Column(scale=2):
            run = _choice_of_run(found)
            images = gr.File(label="Images", file_count="multiple", file_types=["image"], height=200)
            beams = gr.Slider(
                1, 16, value=4, step=1, label="Beams", info="More beams give more candidates, and take longer."
            )
            button = gr.Button("Caption", variant="primary")
        with gr.Column(scale=3):
            shown = gr.HTML(elem_classes="shown")
    gr.on(
        [button.click, images.upload],
        answer,
        [run, images, beams],
        shown,
        batch=True,
        max_batch_size=_BATCH,
        concurrency_id="itit",
        api_name="caption",
    )


_TABS = {"Caption": _caption}
