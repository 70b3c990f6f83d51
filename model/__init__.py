"""Text in, vectors out. No events, no Kafka, no Redis: torch, transformers, numpy, safetensors.

serving     engine (owns the device) -> encoder, item_table, batch_plan
releases    releases (folders, CURRENT), catalogue_vectors, transition, hot_swap
text        text (what the encoder reads of an item), projection
training    windows -> training_rows, training_data -> trainer -> candidate (training_loss,
            window_encoder, item_vectors, visits, heads, head_training, objective, tower_tuning,
            cheap_dropout, peers); ranker
judging     evaluate (figures), prequential, leave_one_out, baselines;
            comparison, item_slices -> gate
errors      errors
"""
