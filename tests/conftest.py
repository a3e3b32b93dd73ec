from __future__ import annotations

import importlib.util

# What is in there runs in the environment that has vLLM: see tests/vllm/pytest.ini.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["vllm"]
