"""The dashboard of what stands around the service: ingress, broker, Cassandra, what it costs.

Lives here: what is asked of the metrics of HAProxy's exporter, of VerneMQ's /metrics, and of the
metrics endpoint that cass-operator runs beside Cassandra. Rules: their names are theirs; which of
them were seen on a running server stands in docs/verified.md. Must not come in: metrics of the
service (`service`).
"""

from __future__ import annotations

from panels import Query, Sheet, figure, graph

__all__ = ["fleet"]

DEVICES = 'proxy!~"stat.*|health.*"'
CASSANDRA = "org_apache_cassandra_metrics_"
WRITES = 'request_type=~"(?i)write"'


def rate(metric: str, labels: str = "", by: str = "instance") -> str:
    """Return the events a second, added up by a label."""
    chosen = f"{{{labels}}}" if labels else ""
    return f"sum by ({by}) (rate({metric}{chosen}[$__rate_interval]))"


def fleet() -> Sheet:
    """Make the dashboard."""
    sheet = Sheet(
        "shadowsvc-fleet",
        "shadowsvc: the fleet",
        "Devices, ingress (HAProxy), broker (VerneMQ) and Cassandra around shadowsvc.",
    )
    for add in (_headline, _ingress, _configuration, _broker, _broker_machine, _cassandra):
        add(sheet)
    return sheet


def _headline(sheet: Sheet) -> None:
    sheet.row(
        "Headline",
        figure("Connections", "Devices that are connected.", "short",
               Query("headline:connections:sum", "connections")),
        figure("Publishes", "What devices publish, a second.", "ops",
               Query("headline:publishes:rate1m", "publishes")),
        figure("Durable", "Updates that Cassandra confirmed, a second.", "ops",
               Query("headline:durable:rate1m", "durable")),
        figure("Publish to durable, p50", "From the device's time to the confirmed write.", "s",
               Query("headline:publish_to_durable_seconds:p50_5m", "p50")),
        figure("Publish to durable, p99", "From the device's time to the confirmed write.", "s",
               Query("headline:publish_to_durable_seconds:p99_5m", "p99"), warning=1, critical=10),
        figure("Cost of a device, a month", "By the prices in deploy/monitoring/rules/cost.yml.",
               "short", Query("headline:cost_per_device_month:ratio", "cost"), decimals=6),
        graph("Answering their scrapes", "Instances of each kind.", "short",
              Query("count by (job) (up == 1)", "{{job}}"), width=12),
        graph("Cost a month", "By the prices in deploy/monitoring/rules/cost.yml.", "short",
              Query("cost:month:sum", "sum"), width=12),
    )  # fmt: skip


def _ingress(sheet: Sheet) -> None:
    sheet.row(
        "Ingress: HAProxy",
        graph("Connections of devices", "By frontend.", "short",
              Query(f"sum by (proxy) (haproxy_frontend_current_sessions{{{DEVICES}}})",
                    "{{proxy}}"), stacked=True),
        graph("New connections", "A storm shows here first.", "ops",
              Query(rate("haproxy_frontend_connections_total", DEVICES, "proxy"), "{{proxy}}")),
        graph("Refused", "By the connection-rate limit.", "ops",
              Query(rate("haproxy_frontend_denied_connections_total", DEVICES, "proxy"),
                    "{{proxy}} connections"),
              Query(rate("haproxy_frontend_denied_sessions_total", DEVICES, "proxy"),
                    "{{proxy}} sessions")),
        graph("Share of the limit", "Connections of one HAProxy, by how many it may have.",
              "percentunit",
              Query("haproxy_process_current_connections / haproxy_process_max_connections")),
        graph("Servers", "Brokers' listeners, by state.", "short",
              Query("sum by (proxy, state) (haproxy_backend_agg_server_status)",
                    "{{proxy}} {{state}}")),
        graph("Connections by server", "They should be even.", "short",
              Query("sum by (proxy, server) (haproxy_server_current_sessions)",
                    "{{proxy}} {{server}}")),
        graph("Failed towards brokers", "Connects that failed, and attempts that were repeated.",
              "ops",
              Query(rate("haproxy_backend_connection_errors_total", by="proxy"),
                    "{{proxy}} failed"),
              Query(rate("haproxy_backend_retry_warnings_total", by="proxy"),
                    "{{proxy}} repeated")),
        graph("Traffic", "From and to devices.", "Bps",
              Query(rate("haproxy_frontend_bytes_in_total", DEVICES, "job"), "in"),
              Query(rate("haproxy_frontend_bytes_out_total", DEVICES, "job"), "out")),
        graph("Idle", "Share of time in which HAProxy has nothing to do.", "percent",
              Query("haproxy_process_idle_time_percent")),
    )  # fmt: skip


def _configuration(sheet: Sheet) -> None:
    sheet.row(
        "Ingress: what HAProxy is told (shadowsvc ingress)",
        graph("Ready", "By process; and whether HAProxy answers.", "short",
              Query("shadowsvc_ingress_ready", "{{instance}} ready"),
              Query("shadowsvc_ingress_haproxy_up", "{{instance}} HAProxy")),
        graph("Brokers", "That the API names as ready, and servers in the configuration.", "short",
              Query("shadowsvc_ingress_brokers", "{{instance}} brokers"),
              Query("sum by (instance, backend) (shadowsvc_ingress_servers)",
                    "{{instance}} {{backend}}"),
              Query("shadowsvc_ingress_servers_leaving", "{{instance}} leaving")),
        graph("Last good configuration", "1 while it stays, though another one is wanted.", "short",
              Query("shadowsvc_ingress_configuration_refused", "{{instance}} refused"),
              Query("shadowsvc_ingress_brokers_absent", "{{instance}} no brokers"),
              Query("shadowsvc_ingress_certificates_faulty", "{{instance}} certificates")),
        graph("Kubernetes API", "Time since its last answer; 0 or 1: whether it answers.", "s",
              Query("shadowsvc_ingress_api_answer_age_seconds", "{{instance}} age"),
              Query("shadowsvc_ingress_api_up", "{{instance}} up")),
        graph("Requests to it", "Lists, events of watches, errors.", "ops",
              Query(rate("shadowsvc_ingress_api_lists_total"), "{{instance}} lists"),
              Query(rate("shadowsvc_ingress_api_events_total", by="kind"), "event: {{kind}}"),
              Query(rate("shadowsvc_ingress_api_errors_total", by="reason"), "error: {{reason}}"),
              Query(rate("shadowsvc_ingress_api_watches_expired_total"), "{{instance}} expired"),
              Query(rate("shadowsvc_ingress_empty_answers_total"), "{{instance}} empty")),
        graph("Changes", "Through the runtime API, by reload, by a new start.", "ops",
              Query(rate("shadowsvc_ingress_server_changes_total", by="kind"), "server: {{kind}}"),
              Query(rate("shadowsvc_ingress_reloads_total", by="result"), "reload: {{result}}"),
              Query(rate("shadowsvc_ingress_configurations_refused_total", by="by"),
                    "refused by {{by}}"),
              Query(rate("shadowsvc_ingress_haproxy_starts_total"), "{{instance}} starts")),
        graph("Certificates for devices: time left", "Replace them before it is 0.", "s",
              Query("shadowsvc_ingress_certificate_expiry_timestamp_seconds - time()",
                    "{{instance}} {{file}}")),
        graph("Certificates", "Taken into use, and unusable.", "ops",
              Query(rate("shadowsvc_ingress_certificates_changed_total"), "{{instance}} changed"),
              Query(rate("shadowsvc_ingress_certificates_unusable_total"),
                    "{{instance}} unusable")),
        graph("Version", "What runs where.", "short",
              Query("count by (version, python) (shadowsvc_ingress_build_info)",
                    "{{version}}, Python {{python}}")),
    )  # fmt: skip


def _broker(sheet: Sheet) -> None:
    sheet.row(
        "Broker: VerneMQ",
        graph("Connections", "By node; the service's own among them.", "short",
              Query("sum by (node) (socket_open) - sum by (node) (socket_close)", "{{node}}"),
              stacked=True),
        graph("Publishes", "Received from devices, sent to subscribers.", "ops",
              Query(rate("mqtt_publish_received", by="node"), "{{node}} received"),
              Query(rate("mqtt_publish_sent", by="node"), "{{node}} sent")),
        graph("Connects", "And sockets closed, by error or not.", "ops",
              Query(rate("mqtt_connect_received", by="node"), "{{node}} CONNECT"),
              Query(rate("socket_close", by="node"), "{{node}} closed"),
              Query(rate("socket_error", by="node"), "{{node}} error"),
              Query(rate("client_keepalive_expired", by="node"), "{{node}} keep-alive expired")),
        graph("Queues", "Messages in and out; the difference is what piles up.", "ops",
              Query(rate("queue_message_in", by="job"), "in"),
              Query(rate("queue_message_out", by="job"), "out")),
        graph("Lost", "Dropped by full queues, without a subscriber, expired.", "ops",
              Query(rate("queue_message_drop", by="node"), "{{node}} dropped"),
              Query(rate("queue_message_unhandled", by="node"), "{{node}} unhandled"),
              Query(rate("queue_message_expired", by="node"), "{{node}} expired")),
        graph("Backlog", "In less out, dropped and expired, since the nodes started.", "short",
              Query("clamp_min(sum(queue_message_in) - sum(queue_message_out)"
                    " - sum(queue_message_drop) - sum(queue_message_expired), 0)", "messages")),
        graph("Netsplit", "Detected and not resolved.", "short",
              Query("netsplit_detected - netsplit_resolved", "{{node}}")),
        graph("Between nodes", "Bytes that a node could not send to another are lost.", "Bps",
              Query(rate("cluster_bytes_sent", by="node"), "{{node}} sent"),
              Query(rate("cluster_bytes_dropped", by="node"), "{{node}} dropped")),
        graph("Refused", "Publishes and subscriptions against the access list.", "ops",
              Query(rate("mqtt_publish_auth_error", by="node"), "{{node}} publish"),
              Query(rate("mqtt_subscribe_auth_error", by="node"), "{{node}} subscribe")),
    )  # fmt: skip


def _broker_machine(sheet: Sheet) -> None:
    sheet.row(
        "Broker: the Erlang machine",
        graph("Memory", "Of a node.", "bytes", Query("vm_memory_total", "{{node}}")),
        graph("Schedulers", "How busy they are.", "percent",
              Query("system_utilization", "{{node}}")),
        graph("Run queue", "Processes that wait for a scheduler.", "short",
              Query("system_run_queue", "{{node}}")),
        graph("Processes", "Two a connection, three with TLS.", "short",
              Query("system_process_count", "{{node}}"), width=12),
        graph("Queues and subscriptions", "Sessions, offline ones too; subscriptions.", "short",
              Query("queue_processes", "{{node}} sessions"),
              Query("router_subscriptions", "{{node}} subscriptions"), width=12),
    )  # fmt: skip


def _cassandra(sheet: Sheet) -> None:
    sheet.row(
        "Cassandra",
        graph("Time of a write, p99", "At the coordinator.", "µs",
              Query(f'{CASSANDRA}client_request_latency{{{WRITES}, quantile="0.99"}}')),
        graph("Writes", "By coordinator.", "ops",
              Query(rate(f"{CASSANDRA}client_request_latency_count", WRITES))),
        graph("Writes that failed", "Timed out, without a quorum, refused by a replica.", "ops",
              Query(rate(f"{CASSANDRA}client_request_timeouts_total", WRITES),
                    "{{instance}} timed out"),
              Query(rate(f"{CASSANDRA}client_request_unavailables_total", WRITES),
                    "{{instance}} unavailable"),
              Query(rate(f"{CASSANDRA}client_request_failures_total", WRITES),
                    "{{instance}} failed")),
        graph("Dropped", "Messages that waited too long, by kind.", "ops",
              Query(rate(f"{CASSANDRA}dropped_message_dropped_total", by="message_type"),
                    "{{message_type}}")),
        graph("Writes that wait", "In front of the stage that applies them.", "short",
              Query(f'{CASSANDRA}thread_pools_pending_tasks{{pool_name="MutationStage"}}')),
        graph("Compactions that wait", "Growing: the disk takes less than is written.", "short",
              Query(f"{CASSANDRA}compaction_pending_tasks")),
        graph("Data", "On a node's disk.", "bytes", Query(f"{CASSANDRA}storage_load")),
        graph("Clients", "Native connections.", "short",
              Query(f"{CASSANDRA}client_connected_native_clients")),
        graph("Heap", "In use.", "bytes",
              Query('jvm_memory_used{job="cassandra", memory_type="heap"}')),
    )  # fmt: skip
