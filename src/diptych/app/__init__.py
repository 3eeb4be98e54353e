"""The local page of `diptych app`. Only `page.py` and the start in `serve.py` need gradio, the extra `app`."""
