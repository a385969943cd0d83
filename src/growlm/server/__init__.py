"""Server: an engine behind HTTP, as clients of OpenAI's interface speak it. See `app.py`."""
