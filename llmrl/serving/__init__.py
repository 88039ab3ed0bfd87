"""Serving with vLLM: a plugin that knows llmrl's folders, `llmrl serve`, and a check that vLLM agrees with transformers."""
