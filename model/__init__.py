"""Text in, vectors out. No events, no Kafka, no Redis: torch, transformers, numpy, safetensors.

serving     engine (owns the device) -> encoder, item_table, batch_plan
releases    releases (folders, CURRENT), projection
text        text (what the encoder reads of an item)
errors      errors
"""
