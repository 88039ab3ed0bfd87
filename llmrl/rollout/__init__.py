"""One rollout engine for all methods: token ids in, token ids and logprobs out, whatever the backend.

`llmrl.rollout.backends.open_engine` opens one; `llmrl.rollout.protocols` says what it can be asked.
"""
