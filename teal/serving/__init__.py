"""An HTTP server with the OpenAI API, and a page to try it.

Import `app` to build the application; nothing else in the project imports from here but serve.py.
"""
