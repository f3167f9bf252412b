"""RandLoRA beside peft's RandLoRA and LoRA."""
