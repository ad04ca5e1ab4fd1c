"""The plugins' names as --plugin gives them, for the flags and the engine alike. Imports nothing."""

GEMINI = "gemini"
GEMINI_AUTO = "gemini_auto"
ZERO2 = "zero2"
ZERO2_CPU = "zero2_cpu"
HYBRID_3D = "3d"
DDP = "ddp"

PLUGIN_NAMES = (GEMINI, GEMINI_AUTO, ZERO2, ZERO2_CPU, HYBRID_3D, DDP)
