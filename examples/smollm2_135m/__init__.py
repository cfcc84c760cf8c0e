"""SmolLM2-135M that learns to see: a recipe for one GPU, and a demo for two CPU cores."""
