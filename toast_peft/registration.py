"""Makes PEFT know the method. PEFT's list of methods is a closed enum, so it has to be extended first."""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from .card import register_model_card


def _add_peft_type(name: str) -> None:
    # PEFT uses `.value` and `PeftType(name)` on the type, so a plain string or attribute would not do. An Enum cannot
    # be subclassed once it has members; this builds the member as EnumMeta does.
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    vars(member).update(__objclass__=PeftType, _sort_order_=len(PeftType._member_names_))
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member


def register(config_cls: type, model_cls: Any) -> None:
    """Register the method under the PEFT type "TOPDOWN".

    Safe to call again, as when the package is reloaded: the latest classes count.

    Args:
        config_cls: the `PeftConfig` of the method.
        model_cls: its `BaseTuner`, whose `prefix` all adapter parameters carry.
    """
    if "TOPDOWN" not in PeftType._member_map_:
        _add_peft_type("TOPDOWN")
        register_model_card()
    if PeftType("TOPDOWN") in PEFT_TYPE_TO_CONFIG_MAPPING:
        _forget()
    register_peft_method(name="topdown", config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)


def _forget() -> None:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        mapping.pop(PeftType("TOPDOWN"), None)
