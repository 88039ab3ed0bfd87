"""llmrl: post-training and agent RL for open causal language models, ending in something vLLM serves.

`import llmrl` is light: torch and transformers load when something needs them. It also teaches
`AutoModelForCausalLM.from_pretrained` to open the folders llmrl writes, whichever of the two is imported first.
"""

from llmrl import _autoregister
from llmrl._version import __version__

__all__ = ["__version__"]

_autoregister.install()
