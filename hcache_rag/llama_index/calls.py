"""What a call of an LLM takes: options, and messages as a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from transformers import PreTrainedTokenizerBase

from hcache_rag.generation import GenerationOptions

PER_CALL = ("max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed")
SAMPLING = ("do_sample", "temperature", "top_p", "top_k")

_ROLES = {
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.DEVELOPER: "system",
    MessageRole.FUNCTION: "tool",
}
"""LlamaIndex's roles that chat templates call by another name."""


def options_of(
    max_new_tokens: int,
    temperature: float,
    generate_kwargs: Mapping[str, Any],
    given: Mapping[str, Any],
) -> GenerationOptions:
    """How to decode in one call.

    Args:
        max_new_tokens, temperature: the LLM's own.
        generate_kwargs: for transformers' `generate`; sampling arguments among them are defaults.
        given: what the caller gave with this call, which goes first; None is nothing given. `top_p`
            or `top_k` without a temperature ask for one of 1 where the LLM's own is 0.

    Raises:
        TypeError: there is no such argument.
        ValueError: one makes no sense.
    """
    unknown = sorted(set(given) - set(PER_CALL))
    if unknown:
        known = ", ".join(PER_CALL)
        raise TypeError(f"unknown argument(s) {', '.join(unknown)}; known per call: {known}")
    given = {name: value for name, value in given.items() if value is not None}
    own = {name: generate_kwargs[name] for name in ("top_p", "top_k") if name in generate_kwargs}
    temperature = temperature_of(generate_kwargs, temperature)
    if not temperature and ("top_p" in given or "top_k" in given):
        temperature = 1.0
    its = {"max_new_tokens": max_new_tokens, "temperature": temperature, **own, **given}
    extra = {name: value for name, value in generate_kwargs.items() if name not in SAMPLING}
    return GenerationOptions(**its, extra=extra)


def temperature_of(generate_kwargs: Mapping[str, Any], otherwise: float) -> float:
    """The temperature that arguments of transformers' `generate` say, if they do."""
    does_sample = generate_kwargs.get("do_sample")
    if does_sample is False:
        return 0.0
    temperature = generate_kwargs.get("temperature")
    if temperature is not None:
        return float(temperature)
    return otherwise or 1.0 if does_sample else otherwise


def chat_template_of(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[Sequence[ChatMessage]], str]:
    """Messages to a prompt by the tokenizer's chat template.

    Raises:
        ValueError: when it is called: the template refuses these messages.
    """

    def messages_to_prompt(messages: Sequence[ChatMessage]) -> str:
        plain = [
            {"role": _ROLES.get(m.role, m.role.value), "content": m.content or ""} for m in messages
        ]
        try:
            return str(
                tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:  # templates raise what they like
            roles = ", ".join(message["role"] for message in plain)
            raise ValueError(f"the chat_template refuses messages ({roles}): {error}") from error

    return messages_to_prompt
