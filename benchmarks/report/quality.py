"""The output of `cast eval --json`: perplexities of several models on the same text."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from conversion.errors import InputError


class ModelQuality(BaseModel):
    perplexity: float
    tokens: int
    context: int


class Quality(BaseModel):
    models: dict[str, ModelQuality]

    @classmethod
    def read(cls, path: Path) -> "Quality":
        """Models are named by the last part of their directories; InputError if `path` holds something else."""
        try:
            found = cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            raise InputError(f"{path} is no output of `cast eval --json`: write it again") from None
        return cls(models={Path(name).name: model for name, model in found.models.items()})
