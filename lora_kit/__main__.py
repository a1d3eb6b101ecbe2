"""`python -m lora_kit` and `accelerate launch -m lora_kit`: the same commands as `lora-kit`."""

from lora_kit.cli import app

if __name__ == "__main__":
    app(prog_name="lora-kit")
