"""The output of `cast eval --json`: perplexities of several models on the same text."""

from collections import Counter
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from conversion.errors import InputError


class ModelQuality(BaseModel):
    perplexity: float
    tokens: int
    context: int


class Quality(BaseModel):
    models: dict[str, ModelQuality] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> "Quality":
        """Read it; InputError if `path` holds something else.

        Models are named by the last part of their directories, or in full where several would have the same name.
        """
        try:
            found = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            raise InputError(f"{path} is no output of `cast eval --json`: write it again") from None
        called = Counter(Path(name).name for name in found.models)
        return cls(
            models={
                name if called[Path(name).name] > 1 else Path(name).name: model for name, model in found.models.items()
            }
        )
