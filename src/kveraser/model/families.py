"""The model families whose caches the tests prove to be edited exactly, on tiny models built from their configs."""

PROVEN_FAMILIES = {
    "llama": "rotary positions",
    "qwen2": "rotary positions",
    "qwen3": "rotary positions",
    "mistral": "rotary positions; full attention only",
    "phi3": "rotary positions; with longrope (Phi-3.5, Phi-4-mini) up to original_max_position_embeddings",
    "gemma": "rotary positions",
    "gpt_neox": "partly rotary positions",
    "gpt2": "learned positions; methods that move keys refuse",
}
