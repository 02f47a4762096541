"""Router-aware compression of mixture-of-experts language models."""

from lightning_smoe.models.registration import register_families

__version__ = "0.1.0"

# So that AutoModelForCausalLM loads folders whose router rows share experts.
register_families()
