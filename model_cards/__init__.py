"""Card templates; installed as `hf_coar.model_cards`, so that they travel inside the wheel."""
