"""One specialised model per task, as one service: a vLLM server for each, and one OpenAI-compatible endpoint in front.

`spec` reads what is asked for; `memory` says what of it fits; `services` turns it into processes, which `local` runs on
this machine under supervisor, with vllm-router in front (`endpoint`); `render` writes it for Kubernetes or Ray instead.
"""
