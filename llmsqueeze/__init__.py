"""Post-training compression of language models: smaller files, measured quality.

Importing this package teaches transformers to load llmsqueeze checkpoints with
``AutoModelForCausalLM.from_pretrained``. It imports neither torch nor transformers itself.
"""

from llmsqueeze import _register
from llmsqueeze._version import __version__
from llmsqueeze.errors import LlmsqueezeError

__all__ = ["LlmsqueezeError", "__version__"]


_register.install()
