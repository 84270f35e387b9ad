"""The Megatron-Core actor."""

from icrl_megatron.distributed import before_megatron as before_megatron
