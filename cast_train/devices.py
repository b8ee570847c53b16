"""What accelerators can do at best, by their makers' data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """Attributes: flops: peak of dense bf16 products, per second; memory: bytes."""

    flops: float
    memory: float


ACCELERATORS: dict[str, Accelerator] = {
    "a100-40gb": Accelerator(312e12, 40e9),
    "a100": Accelerator(312e12, 80e9),
    "h100-pcie": Accelerator(756e12, 80e9),
    "h100": Accelerator(989e12, 80e9),
    "h200": Accelerator(989e12, 141e9),
}


def accelerator_key(device_name: str) -> str | None:
    """Return the key in ACCELERATORS of a device by the name that its driver gives it; None if it is not known."""
    name = device_name.lower().replace(" ", "-")
    for known in sorted(ACCELERATORS, key=len, reverse=True):  # "h100-pcie" before "h100"
        if known.removesuffix("-40gb") in name:
            return known
    return None


def peak_flops(device_name: str) -> float | None:
    """Return the peak bf16 FLOP/s of a device by the name that its driver gives it; None if it is not known."""
    key = accelerator_key(device_name)
    return None if key is None else ACCELERATORS[key].flops
