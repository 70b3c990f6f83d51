"""Kafka in, profiles out: the processes and tools of Penchant. The only package that knows events.

processes   updater_app (`penchant updater`), trainer_app (`penchant trainer`), demo, replay
an event    events -> intake -> contributions -> updater -> catalogue, forwarding, dead_letter
a release   swapping (flip between micro-batches), migration (profiles of other spaces)
learning    ingest -> archive -> labelling -> learning (`penchant learn`)
judging     evaluation, evaluation_data, evaluation_view (`penchant eval`)
Kafka       topics, offsets, group_protocol, producer, producing
local       local_stack, local_servers, apache_kafka, processes, process_guard
command     cli, feeding_cli, releases_cli, eval_cli, terminal
shown       metrics, profile_view, live_view, demo_parts, demo_watch, demo_signals
data        datasets, tables, schemas, base_release
settings    settings, errors
"""
