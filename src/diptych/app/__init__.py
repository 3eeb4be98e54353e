"""The local page of `diptych app`. Only `page.py` needs gradio, the extra `app`."""
