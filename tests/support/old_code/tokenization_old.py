"""The tokenizer: a token for each byte. It pads on the left, and knows of no other side."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizer


class OldTokenizer(PreTrainedTokenizer):
    """Bytes."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012

    def __init__(self, padding_side: str = "left", **options: Any) -> None:
        super().__init__(padding_side=padding_side, **options)

    @property
    def eos_token(self) -> str:
        """End of text."""
        return "</s>"

    @property
    def eos_token_id(self) -> int:
        """Its number."""
        return 256

    @property
    def pad_token(self) -> str:
        """Padding."""
        return "<unk>"

    @property
    def pad_token_id(self) -> int:
        """Its number."""
        return 257

    @property
    def vocab_size(self) -> int:
        """Bytes and special tokens."""
        return 259

    def get_vocab(self) -> dict[str, int]:
        """All tokens."""
        return {self._convert_id_to_token(number): number for number in range(self.vocab_size)}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [f"{byte:02x}" for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        special = {"</s>": 256, "<unk>": 257}
        return special[token] if token in special else int(token, 16)

    def _convert_id_to_token(self, index: int) -> str:
        return {256: "</s>", 257: "<unk>", 258: "<extra>"}.get(index, f"{index:02x}")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text."""
        return bytes(int(token, 16) for token in tokens if len(token) == 2).decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """There is none."""
        return ()

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: Any = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
    ) -> Any:
        assert self.padding_side == "left"
        return encoded_inputs
