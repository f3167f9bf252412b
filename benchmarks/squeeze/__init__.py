"""LoRA-Squeeze beside other ways to lower a rank."""
