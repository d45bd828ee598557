"""One configuration and one model with a mixer slot, registered with transformers' Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from loglinear.models.cache import (
    MixerCacheLayer,
    cache_nbytes,
    cache_to,
    copy_cache,
    new_cache,
    repeat_rows,
    select_rows,
    stack_caches,
)
from loglinear.models.cache_files import SavedCache, load_cache, load_saved, save_cache
from loglinear.models.config import LogLinearConfig
from loglinear.models.cost import Cost
from loglinear.models.decoding import GraphedStep, decoding_cache
from loglinear.models.model import LogLinearForCausalLM, LogLinearModel
from loglinear.models.optim import parameter_groups

AutoConfig.register(LogLinearConfig.model_type, LogLinearConfig, exist_ok=True)
AutoModel.register(LogLinearConfig, LogLinearModel, exist_ok=True)
AutoModelForCausalLM.register(LogLinearConfig, LogLinearForCausalLM, exist_ok=True)

__all__ = [
    "Cost",
    "GraphedStep",
    "LogLinearConfig",
    "LogLinearForCausalLM",
    "LogLinearModel",
    "MixerCacheLayer",
    "SavedCache",
    "cache_nbytes",
    "cache_to",
    "copy_cache",
    "decoding_cache",
    "load_cache",
    "load_saved",
    "new_cache",
    "parameter_groups",
    "repeat_rows",
    "save_cache",
    "select_rows",
    "stack_caches",
]
