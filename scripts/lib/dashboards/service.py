"""The dashboard of the service, along the way of an update: in, decode, batch, write, acknowledge.

Lives here: what is asked of the metrics that `shadowsvc.metrics` exports; each is asked for here or
by an alert. Must not come in: other programs' metrics (`fleet`).
"""

from __future__ import annotations

from panels import Graph, Query, Sheet, figure, graph

__all__ = ["service"]

WHO = 'instance=~"$instance"'


def rate(metric: str, more: str = "", by: str = "instance") -> str:
    """Return the events a second, added up by a label."""
    labels = f"{WHO}, {more}" if more else WHO
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def quantile(share: float, histogram: str) -> str:
    """Return what `share` of all observations of a histogram stay below, all processes together."""
    return (
        f"histogram_quantile({share}, "
        f"sum by (le) (rate({histogram}_bucket{{{WHO}}}[$__rate_interval])))"
    )


def gauge(metric: str) -> str:
    """Return it as it is."""
    return f"{metric}{{{WHO}}}"


def latency(title: str, description: str, histogram: str, unit: str = "s") -> Graph:
    """Show median, p99 and p99.9 of a histogram."""
    shares = ((0.5, "p50"), (0.99, "p99"), (0.999, "p99.9"))
    queries = (Query(quantile(share, histogram), name) for share, name in shares)
    return graph(title, description, unit, *queries)


def service() -> Sheet:
    """Make the dashboard."""
    sheet = Sheet(
        "shadowsvc-service",
        "shadowsvc: the way of an update",
        "From the broker's PUBLISH to PUBACK, for each process. docs/metrics.md has every metric.",
    )
    sheet.choose("instance", "Process", "label_values(shadowsvc_build_info, instance)")
    for add in (_headline, _way_in, _batches, _writes, _acks, _connection, _slots, _process):
        add(sheet)
    return sheet


def _headline(sheet: Sheet) -> None:
    sheet.row(
        "Headline",
        figure("Ready", "Processes that are ready.", "short",
               Query(f"sum({gauge('shadowsvc_ready')})", "ready")),
        figure("Updates durable", "Updates that Cassandra confirmed, a second.", "ops",
               Query(rate("shadowsvc_updates_durable_total", by="job"), "durable")),
        figure("Device to durable, p50", "From the device's time to the confirmed write.", "s",
               Query(quantile(0.5, "shadowsvc_device_to_durable_seconds"), "p50")),
        figure("Device to durable, p99", "From the device's time to the confirmed write.", "s",
               Query(quantile(0.99, "shadowsvc_device_to_durable_seconds"), "p99"),
               warning=1, critical=10),
        figure("Oldest unacknowledged", "The age of the oldest delivery without an ack.", "s",
               Query(f"max({gauge('shadowsvc_oldest_unacknowledged_seconds')})", "oldest"),
               warning=30, critical=300),
        figure("Dead letters", "Rows written in the last hour.", "short",
               Query(f"sum(increase(shadowsvc_dead_letters_total{{{WHO}}}[1h])) or vector(0)",
                     "rows"),
               decimals=0, warning=1),
        graph("Reasons not to be ready", "1 while a process has this reason; docs/runbooks has a "
              "page for each.", "short",
              Query(f"{gauge('shadowsvc_not_ready')} == 1", "{{instance}} {{reason}}"), width=12),
        graph("Version", "What runs where: more than one line is a rollout.", "short",
              Query(f"count by (version, python) ({gauge('shadowsvc_build_info')})",
                    "{{version}}, Python {{python}}"), width=12),
    )  # fmt: skip


def _way_in(sheet: Sheet) -> None:
    sheet.row(
        "In: from the broker, decoded",
        graph("Messages received", "PUBLISH packets, repetitions by the broker included.", "ops",
              Query(rate("shadowsvc_messages_received_total"))),
        graph("By QoS, and repeated", "dup 1: the broker sent it before.", "ops",
              Query(rate("shadowsvc_messages_received_total", by="qos, dup"),
                    "QoS {{qos}}, dup {{dup}}"), stacked=True),
        graph("Bytes received", "Topics and payloads.", "Bps",
              Query(rate("shadowsvc_received_bytes_total"))),
        graph("Became an update", "Decoded, of these without effect, and without a device's time.",
              "ops",
              Query(rate("shadowsvc_updates_decoded_total", by="job"), "decoded"),
              Query(rate("shadowsvc_updates_empty_total", by="job"), "change nothing"),
              Query(rate("shadowsvc_updates_without_device_time_total", by="job"),
                    "got the receive time")),
        graph("Rejected, by reason", "Messages that are no update; rows of dead letters.", "ops",
              Query(rate("shadowsvc_updates_rejected_total", by="reason"), "rejected: {{reason}}"),
              Query(rate("shadowsvc_dead_letters_total", by="reason"), "row: {{reason}}"),
              Query(rate("shadowsvc_dead_letters_suppressed_total", by="job"), "without a row")),
        graph("Left out", "QoS 0 above the budget is dropped; while stopping all is left to the "
              "broker.", "ops",
              Query(rate("shadowsvc_qos0_dropped_total"), "{{instance}} QoS 0"),
              Query(rate("shadowsvc_messages_discarded_draining_total"), "{{instance}} stopping")),
    )  # fmt: skip


def _batches(sheet: Sheet) -> None:
    sheet.row(
        "Batch and merge",
        latency("Devices in a batch", "Large batches cost less CPU an update.",
                "shadowsvc_batch_partitions", "short"),
        graph("Devices allowed in a batch", "What the settings and every node's thresholds allow.",
              "short", Query(gauge("shadowsvc_batch_max_partitions"))),
        graph("Bytes allowed in a batch", "Likewise.", "bytes",
              Query(gauge("shadowsvc_batch_max_bytes"))),
        graph("Merged", "Updates that were written together with a neighbour of their device.",
              "ops", Query(rate("shadowsvc_updates_merged_total"))),
        graph("Leaves merged away", "Leaves that a later update of the same batch made needless.",
              "ops", Query(rate("shadowsvc_leaves_merged_away_total"))),
    )  # fmt: skip


def _writes(sheet: Sheet) -> None:
    sheet.row(
        "Write: to Cassandra",
        latency("Time of a request", "From the driver's call to its answer.",
                "shadowsvc_write_seconds"),
        graph("p99 of a request, by process", "One that differs from the others has a problem of "
              "its own.", "s", Query(gauge("instance:shadowsvc_write_seconds:p99_5m"))),
        graph("Requests", "At Cassandra, and how many may be.", "short",
              Query(gauge("shadowsvc_writes_in_flight"), "{{instance}} in flight"),
              Query(gauge("shadowsvc_writes_limit"), "{{instance}} limit")),
        graph("Batches, by way", "Own connections cost half of what the driver does.", "ops",
              Query(rate("shadowsvc_batches_sent_total", by="way"), "{{way}}")),
        graph("Own connections", "To replicas; fewer than nodes: the log says why.", "short",
              Query(gauge("shadowsvc_direct_connections"))),
        graph("Changes of the limit", "overload: Cassandra refused, or was too slow.", "ops",
              Query(rate("shadowsvc_writes_limit_changes_total", by="reason"), "{{reason}}")),
        graph("Errors, by kind", "Requests that failed.", "ops",
              Query(rate("shadowsvc_write_errors_total", by="kind"), "{{kind}}")),
        graph("Repetitions, by kind", "Requests that were sent again, with the same times.", "ops",
              Query(rate("shadowsvc_write_retries_total", by="kind"), "{{kind}}")),
        graph("Waiting for their next attempt", "Batches and dead letters.", "short",
              Query(gauge("shadowsvc_retries_waiting"))),
        graph("Replica sets in doubt", "Groups of devices whose last answer was an outage.",
              "short", Query(gauge("shadowsvc_replica_sets_in_doubt"))),
        graph("Batches split", "Refused batches that were planned again, to find the culprit.",
              "ops", Query(rate("shadowsvc_batches_split_total"))),
    )  # fmt: skip


def _acks(sheet: Sheet) -> None:
    sheet.row(
        "Acknowledge",
        latency("Receipt to ack", "From PUBLISH received to PUBACK sent.",
                "shadowsvc_receive_to_ack_seconds"),
        latency("Device to durable", "From the device's time to the confirmed write; wrong clocks "
                "of devices show too.", "shadowsvc_device_to_durable_seconds"),
        graph("p99 of receipt to ack, by process", "Alerts look at this.", "s",
              Query(gauge("instance:shadowsvc_receive_to_ack_seconds:p99_5m"))),
        graph("Acknowledged", "PUBACKs sent.", "ops",
              Query(rate("shadowsvc_messages_acknowledged_total"))),
        graph("Ended otherwise", "QoS 0 and last copies have no ack; others went with their "
              "connection and come again.", "ops",
              Query(rate("shadowsvc_deliveries_done_without_ack_total", by="job"), "without ack"),
              Query(rate("shadowsvc_acks_stale_total", by="job"), "ack stale"),
              Query(rate("shadowsvc_deliveries_abandoned_total", by="job"), "abandoned")),
        graph("Oldest unacknowledged", "Age of the oldest delivery whose ack has not left.", "s",
              Query(gauge("shadowsvc_oldest_unacknowledged_seconds"))),
        graph("Unacknowledged", "At the Receive Maximum the broker sends no more.", "short",
              Query(gauge("shadowsvc_unacknowledged_deliveries"))),
        graph("Held", "Deliveries in memory.", "short", Query(gauge("shadowsvc_deliveries_held"))),
        graph("Bytes held", "Their topics and payloads.", "bytes",
              Query(gauge("shadowsvc_deliveries_held_bytes"))),
    )  # fmt: skip


def _connection(sheet: Sheet) -> None:
    sheet.row(
        "Connection, pause, canary",
        graph("Disconnects, by reason", "Connections lost or not made.", "ops",
              Query(rate("shadowsvc_disconnects_total", by="reason"), "{{reason}}")),
        graph("Sessions", "new: the broker knew nothing of the session.", "ops",
              Query(rate("shadowsvc_sessions_total", by="state"), "{{state}}")),
        graph("Subscribed again", "SUBSCRIBEs that were repeated on a live connection.", "ops",
              Query(rate("shadowsvc_resubscriptions_total"))),
        graph("Pause", "How long a process will still stay away; how many pauses have begun.", "s",
              Query(gauge("shadowsvc_pause_left_seconds"), "{{instance}} left"),
              Query(f"increase(shadowsvc_pauses_total{{{WHO}}}[$__rate_interval])",
                    "{{instance}} begun")),
        graph("Canary", "lost: taken by the broker and never delivered.", "ops",
              Query(rate("shadowsvc_canary_published_total", by="job"), "published"),
              Query(rate("shadowsvc_canary_durable_total", by="job"), "durable"),
              Query(rate("shadowsvc_canary_lost_total", by="job"), "lost"),
              Query(rate("shadowsvc_canary_excused_total", by="job"), "excused"),
              Query(rate("shadowsvc_canary_unpublished_total", by="reason"),
                    "not published: {{reason}}")),
        latency("Canary: published to durable", "Through the broker, by one clock alone.",
                "shadowsvc_canary_seconds"),
    )  # fmt: skip


def _slots(sheet: Sheet) -> None:
    sheet.row(
        "Slots, adoption, isolation",
        graph("State of the slot", "held is well; none has one with a configured client id.",
              "short", Query(f"{gauge('shadowsvc_slot_state')} == 1", "{{instance}} {{state}}")),
        graph("Age of the lease", "Since its last confirmation.", "s",
              Query(gauge("shadowsvc_slot_lease_age_seconds"))),
        graph("Slots change hands", "Taken, and lost or given up.", "ops",
              Query(rate("shadowsvc_slot_takes_total", by="how"), "taken: {{how}}"),
              Query(rate("shadowsvc_slot_losses_total", by="reason"), "lost: {{reason}}")),
        graph("Orphaned slots", "Free for long enough to be adopted; and who adopts just now.",
              "short",
              Query(gauge("shadowsvc_orphaned_slots"), "{{instance}} sees"),
              Query(gauge("shadowsvc_adopting"), "{{instance}} adopts")),
        graph("Adoptions", "How they ended; messages that came that way.", "ops",
              Query(rate("shadowsvc_adoptions_total", by="outcome"), "{{outcome}}"),
              Query(rate("shadowsvc_adopted_messages_total", by="job"), "messages"),
              Query(rate("shadowsvc_markers_total", by="job"), "markers")),
        graph("Isolated", "1: the broker was left, since no write succeeds.", "short",
              Query(gauge("shadowsvc_isolated"), "{{instance}} now"),
              Query(f"increase(shadowsvc_isolations_total{{{WHO}}}[$__rate_interval])",
                    "{{instance}} began")),
    )  # fmt: skip


def _process(sheet: Sheet) -> None:
    sheet.row(
        "Process",
        graph("CPU", "Seconds a second; near 1 the event loop has no time left.", "short",
              Query(rate("process_cpu_seconds_total", 'job="shadowsvc"'))),
        graph("Memory", "Resident.", "bytes",
              Query(f'process_resident_memory_bytes{{{WHO}, job="shadowsvc"}}')),
        graph("Loop lag", "How late the event loop ran its last timer.", "s",
              Query(gauge("shadowsvc_loop_lag_seconds"))),
        graph("Clock", "This machine's clock less Cassandra's; beyond 30 s it is not ready.", "s",
              Query(f"abs({gauge('shadowsvc_clock_offset_seconds')})")),
        graph("Open files", "And how many may be.", "short",
              Query(f'process_open_fds{{{WHO}, job="shadowsvc"}}'),
              Query(f'min(process_max_fds{{{WHO}, job="shadowsvc"}})', "limit")),
        graph("Log lines dropped", "Nobody reads the log fast enough.", "ops",
              Query(rate("shadowsvc_log_lines_dropped_total"))),
        graph("Certificates: time left", "Replace them before it is 0.", "s",
              Query(f"{gauge('shadowsvc_certificate_expiry_timestamp_seconds')} - time()",
                    "{{instance}} {{file}}")),
        graph("Credentials", "Changed files taken into use, unusable, and faulty at present.",
              "short",
              Query(rate("shadowsvc_credentials_changed_total", by="of"), "changed: {{of}}"),
              Query(rate("shadowsvc_credentials_unusable_total", by="of"), "unusable: {{of}}"),
              Query(gauge("shadowsvc_credentials_faulty"), "{{instance}} faulty: {{of}}")),
        graph("Sessions with Cassandra made anew", "By result.", "ops",
              Query(rate("shadowsvc_store_renewals_total", by="result"), "{{result}}")),
    )  # fmt: skip
