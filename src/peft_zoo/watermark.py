"""Watermarks in the images of an autoencoder: keys, training, export and verification."""

from peft_zoo.adapters.watermark_lora import WatermarkLoraConfig
from peft_zoo.tasks.watermark.embed import embed_watermark
from peft_zoo.tasks.watermark.export import merge_and_export
from peft_zoo.tasks.watermark.key import WatermarkKey
from peft_zoo.tasks.watermark.leak_scan import refuse_key_in
from peft_zoo.tasks.watermark.report import EmbedReport
from peft_zoo.tasks.watermark.saved_decoder import calibrate_decoder, load_decoder, save_decoder
from peft_zoo.tasks.watermark.significance import message_p_value
from peft_zoo.tasks.watermark.verify import (
    Identification,
    Verification,
    identify_watermark,
    read_bits,
    verify_watermark,
)

__all__ = [
    "EmbedReport",
    "Identification",
    "Verification",
    "WatermarkKey",
    "WatermarkLoraConfig",
    "calibrate_decoder",
    "embed_watermark",
    "identify_watermark",
    "load_decoder",
    "merge_and_export",
    "message_p_value",
    "read_bits",
    "refuse_key_in",
    "save_decoder",
    "verify_watermark",
]
