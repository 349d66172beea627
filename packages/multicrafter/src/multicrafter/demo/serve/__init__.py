"""The web page: references and a prompt in, pictures out, and beside them who was matched to whom and where the model looked.

`drawing` turns a request into a result and knows nothing of pages; `desk` lets several visitors wait for one model; `views` makes
pieces of HTML; `page` lays them out with gradio (extra ``serve``); `server` opens the port.
"""
