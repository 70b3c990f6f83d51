"""Kafka in, profiles out: the processes and tools of Penchant. The only package that knows events.

processes   updater_app (`penchant updater`), cli, demo, replay
an event    events -> intake -> contributions -> updater -> catalogue, forwarding, dead_letter
Kafka       topics, offsets, group_protocol, producer, producing
local       local_stack, local_servers, apache_kafka, processes, process_guard
shown       metrics, profile_view, live_view, demo_watch
data        datasets, tables, schemas, base_release
settings    settings, errors
"""
