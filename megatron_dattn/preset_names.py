"""Names of the attention presets, for command lines that need not wait for torch.

`attention/presets.py` has the presets themselves; a test holds the two to each other.
"""

PRESET_NAMES = (
    "s_attn",
    "dattn",
    "dattn_biased",
    "s_attn_debias",
    "dattn_sum",
    "dattn_tanh",
    "dattn_sigmoid",
    "dattn_cascade",
    "vidi",
    "ee_mllm",
    "naavit",
    "aki",
    "cca",
    "saisa",
    "shortv",
    "exit",
    "fastervlm",
    "yopo",
)
