"""The description of every endpoint, OpenAPI 3.1, as served at /openapi.json.

One table a kind of endpoint; what they share (answers, keys) is named once under `components`. It describes what we
take and what we answer, so that a tester can make requests from it and check each answer: a request body is allowed
to be anything at all, since every body gets one of the listed answers.
"""

from __future__ import annotations

from typing import Any

from retrofill import __version__
from retrofill.core.why import RULES
from retrofill.limits import MERGES_LISTED_MAX

Json = dict[str, Any]

_INT: Json = {"type": "integer"}
_TEXT: Json = {"type": "string"}
_BOOL: Json = {"type": "boolean"}
_ID_COUNTS: Json = {"type": "object", "additionalProperties": _INT}
_INDEXES: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_FIELD_INDEXES: Json = {"type": "object", "additionalProperties": _INDEXES}
_DAY: Json = {"type": "string", "pattern": "^[0-9]{8}$", "examples": ["20260102"]}
_HOUR: Json = {"type": "string", "pattern": "^[0-9]{8}T[0-9]{2}$", "examples": ["20260102T03"]}


def _object(required: tuple[str, ...] = (), **properties: Json) -> Json:
    schema: Json = {"type": "object", "properties": properties}
    return {**schema, "required": list(required)} if required else schema


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


_NULLABLE_TEXT: Json = {"type": ["string", "null"]}
_EVENT = _object(
    ("event_type",),
    event_type=_TEXT,
    user_id=_NULLABLE_TEXT,
    device_id=_NULLABLE_TEXT,
    time={"type": ["integer", "null"], "description": "milliseconds since the epoch"},
    insert_id=_NULLABLE_TEXT,
    event_properties={"type": ["object", "null"]},
    user_properties={"type": ["object", "null"]},
    groups={"type": ["object", "null"]},
    group_properties={"type": ["object", "null"]},
    session_id={"type": ["integer", "null"]},
    event_id={"type": ["integer", "null"]},
    ip=_NULLABLE_TEXT,
    **{"$skip_user_properties_sync": {"type": ["boolean", "null"]}},
)

_SCHEMAS: Json = {
    "Event": _EVENT,
    "Upload": _object(
        ("api_key", "events"),
        api_key=_TEXT,
        events={**_list({"$ref": "#/components/schemas/Event"}), "minItems": 1, "maxItems": 2000},
        options=_object(min_id_length={"type": ["integer", "null"]}),
        client_upload_time=_TEXT,
    ),
    "Ingested": _object(
        ("code", "events_ingested", "payload_size_bytes", "server_upload_time"),
        code={"const": 200},
        events_ingested=_INT,
        payload_size_bytes=_INT,
        server_upload_time=_INT,
    ),
    "Failure": _object(("code", "error"), code=_INT, error=_TEXT),
    "Invalid": _object(
        ("code", "error"),
        code={"const": 400},
        error=_TEXT,
        missing_field=_NULLABLE_TEXT,
        events_with_invalid_fields=_FIELD_INDEXES,
        events_with_missing_fields=_FIELD_INDEXES,
        events_with_invalid_id_lengths=_FIELD_INDEXES,
        silenced_devices=_list(_TEXT),
        silenced_events=_INDEXES,
    ),
    "Throttled": _object(
        ("code", "error", "eps_threshold", "throttled_events"),
        code={"const": 429},
        error=_TEXT,
        eps_threshold=_INT,
        throttled_devices=_ID_COUNTS,
        throttled_users=_ID_COUNTS,
        exceeded_daily_quota_devices=_ID_COUNTS,
        exceeded_daily_quota_users=_ID_COUNTS,
        throttled_events=_INDEXES,
    ),
    "Problem": _object(
        ("error",),
        error=_object(
            ("http_code", "type", "message"),
            http_code=_INT,
            type=_TEXT,
            message=_TEXT,
            metadata={"type": "object"},
        ),
    ),
    "Series": _object(
        ("data",),
        data=_object(("series", "xValues"), series={"type": "array"}, xValues=_list(_TEXT)),
    ),
    "Row": {"type": "object", "description": "a row of the export: docs/api.md names its keys"},
    "Person": _object(("user_id", "amplitude_id"), user_id=_NULLABLE_TEXT, amplitude_id=_INT),
    "DeletionJob": _object(
        ("day", "status", "amplitude_ids"),
        day=_TEXT,
        status={"enum": ["staging", "submitted", "done"]},
        amplitude_ids=_list({"type": "object"}),
    ),
}


def _json(schema: str | Json, description: str) -> Json:
    shown = {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema
    return {"description": description, "content": {"application/json": {"schema": shown}}}


def _text(description: str) -> Json:
    return {"description": description, "content": {"text/plain": {"schema": _TEXT}}}


_EITHER: Json = {
    "description": "refused, with the reason",
    "content": {
        "text/plain": {"schema": _TEXT},
        "application/json": {
            "schema": {
                "anyOf": [
                    {"$ref": "#/components/schemas/Failure"},
                    {"$ref": "#/components/schemas/Problem"},
                ]
            }
        },
    },
}
_TRANSPORT: Json = {
    "408": _json("Failure", "the body stalled"),
    "413": _json("Failure", "too many bytes or events; send smaller parts"),
    "431": _json("Failure", "the head is too large"),
    "500": _json("Failure", "it is unknown whether anything was stored; send again with insert_id"),
    "503": _json("Failure", "nothing was stored; send again after Retry-After"),
}
_UPLOAD_ANSWERS: Json = {
    "200": _json("Ingested", "stored, synced and visible"),
    "400": _json("Invalid", "nothing stored; the listed events can never pass"),
    "429": _json("Throttled", "nothing stored; the listed events must wait"),
    **_TRANSPORT,
}
_FORM_ANSWERS: Json = {
    "200": _text("success"),
    **dict.fromkeys(("400", "408", "413", "414", "429", "431", "500", "503"), _EITHER),
}
_READ_ANSWERS: Json = {
    status: _json("Problem", text)
    for status, text in {
        "400": "an argument cannot be, or is not answered",
        "401": "the keys belong to no project",
        "429": "too many at once",
    }.items()
} | {"503": _EITHER, "500": _EITHER}


def _upload(summary: str) -> Json:
    content = {"schema": {"$ref": "#/components/schemas/Upload"}}
    return {
        "post": {
            "summary": summary,
            "security": [],
            "requestBody": {
                "required": True,
                "content": {"application/json": content, "text/plain": {"schema": _TEXT}},
            },
            "responses": _UPLOAD_ANSWERS,
        }
    }


def _form(summary: str, *fields: str, get: bool) -> Json:
    schema = _object(fields[:2], **dict.fromkeys(fields, _TEXT))
    content = {
        kind: {"schema": schema}
        for kind in ("application/x-www-form-urlencoded", "multipart/form-data", "application/json")
    }
    shared: Json = {"summary": summary, "security": [], "responses": _FORM_ANSWERS}
    operations: Json = {
        "post": {**shared, "requestBody": {"required": True, "content": content}},
    }
    if get:
        operations["get"] = {
            **shared,
            "parameters": [_query(name, _TEXT, required=name in fields[:2]) for name in fields],
        }
    return operations


def _query(name: str, schema: Json, *, required: bool = False, text: str = "") -> Json:
    said: Json = {"name": name, "in": "query", "required": required, "schema": schema}
    return {**said, "description": text} if text else said


def _read(summary: str, answer: Json, *parameters: Json, **answers: Json) -> Json:
    responses = {"200": answer, **_READ_ANSWERS, **{key[1:]: one for key, one in answers.items()}}
    return {"get": {"summary": summary, "parameters": list(parameters), "responses": responses}}


_RANGE = (_query("start", _DAY, required=True), _query("end", _DAY, required=True))
_INTERVAL = _query("i", {"enum": [1, 7, 30]}, text="days")
_METRICS = ["uniques", "totals", "average", "pct_dau", "sums", "value_avg"]
_SEGMENTS = _query("s", _TEXT, text="JSON: segment definitions")
_GROUP_BY = _query("g", _TEXT, text="group by this property")

_INGEST: Json = {
    "/2/httpapi": _upload("Events, up to 1 MiB and 2,000"),
    "/batch": _upload("Events, up to 20 MiB and 2,000"),
    "/identify": _form("Set properties of users", "api_key", "identification", "options", get=True),
    "/groupidentify": _form(
        "Set properties of groups", "api_key", "identification", "options", get=True
    ),
    "/usermap": _form("Map one user to another", "api_key", "mapping", get=True),
    "/attribution": _form("Accepted and not stored", "api_key", "event", get=False),
    "/httpapi": _form("Events of the deprecated API", "api_key", "event", get=False),
    "/": _form(
        "Events of the first SDKs", "client", "e", "v", "upload_time", "checksum", get=False
    ),
}

_ZIP: Json = {
    "description": "a zip of gzipped files, one JSON row a line",
    "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
}
_READ: Json = {
    "/api/2/export": _read(
        "All rows that arrived in these hours (UTC, both included)",
        _ZIP,
        _query("start", _HOUR, required=True),
        _query("end", _HOUR, required=True),
        _404=_EITHER,
    ),
    "/api/2/usersearch": _read(
        "People by Amplitude ID, device id, user id or its beginning",
        _json(
            _object(
                ("matches", "type"),
                matches=_list({"$ref": "#/components/schemas/Person"}),
                type={
                    "enum": [
                        "match_user_or_device_id",
                        "match_amplitude_id",
                        "match_user_prefix",
                        "nomatch",
                    ]
                },
            ),
            "who was found",
        ),
        _query("user", _TEXT, required=True),
    ),
    "/api/2/useractivity": _read(
        "One person and their latest events",
        _json(
            _object(
                ("userData", "events"),
                userData={"type": "object"},
                events=_list({"$ref": "#/components/schemas/Row"}),
            ),
            "the person; zeros and empty lists if unknown",
        ),
        _query("user", {"type": "integer", "minimum": 0}, required=True, text="Amplitude ID"),
        _query("offset", {"type": "integer", "minimum": 0, "default": 0}),
        _query("limit", {"type": "integer", "minimum": 0, "maximum": 1000, "default": 1000}),
        _query("direction", {"enum": ["latest", "earliest"], "default": "latest"}),
    ),
    "/api/2/users": _read(
        "Active or new users",
        _json("Series", "counts by interval"),
        *_RANGE,
        _query("m", {"enum": ["active", "new"], "default": "active"}),
        _INTERVAL,
        _SEGMENTS,
        _GROUP_BY,
    ),
    "/api/2/sessions/average": _read(
        "Average session length", _json("Series", "seconds by day"), *_RANGE
    ),
    "/api/2/sessions/peruser": _read(
        "Average sessions of a user", _json("Series", "sessions by day"), *_RANGE
    ),
    "/api/2/sessions/length": _read(
        "How many sessions are how long", _json("Series", "counts by length"), *_RANGE
    ),
    "/api/2/events/list": _read(
        "Event types with this week's totals",
        _json(_object(("data",), data=_list({"type": "object"})), "event types"),
    ),
    "/api/2/events/segmentation": _read(
        "An event counted by interval",
        _json("Series", "counts by interval"),
        _query("e", _TEXT, required=True, text="JSON: event_type, filters, group_by"),
        _query("e2", _TEXT, text="a second event, as e"),
        *_RANGE,
        _query("m", {"enum": _METRICS, "default": _METRICS[0]}),
        _query("n", {"enum": ["any", "active"], "default": "any"}),
        _query("i", {"enum": [1, 7, 30, -3_600_000, -300_000], "default": 1}),
        _SEGMENTS,
        _GROUP_BY,
        _query("g2", _TEXT, text="and by this one"),
        _query("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}),
    ),
    "/api/2/usermap": _read(
        "Mappings of up to 100 users",
        _json({"type": "object"}, "by user_id: mapped_from, mapped_to"),
        _query("user_ids", _TEXT, required=True, text="JSON array, or separated by commas"),
    ),
    "/api/2/annotations": _read("Always empty", _json(_object(("data",), data=_list({})), "none")),
    "/api/3/annotations": _read("Always empty", _json(_object(("data",), data=_list({})), "none")),
    "/api/3/cohorts": _read(
        "Always empty", _json(_object(("cohorts",), cohorts=_list({})), "none")
    ),
}

_JOBS = _json(_list({"$ref": "#/components/schemas/DeletionJob"}), "jobs")
_DELETIONS: Json = {
    "/api/2/deletions/users": {
        **_read(
            "Deletion jobs between two days, six months at most",
            _JOBS,
            _query("start_day", {"type": "string", "format": "date"}, required=True),
            _query("end_day", {"type": "string", "format": "date"}, required=True),
        ),
        "post": {
            "summary": "Delete users: all of their events and properties",
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": _object(
                            amplitude_ids=_list(_INT),
                            user_ids=_list({"type": ["string", "integer"]}),
                            requester=_TEXT,
                            ignore_invalid_id={"type": ["boolean", "string"]},
                            delete_from_org={"type": ["boolean", "string"]},
                            include_mapped_user_ids={"type": ["boolean", "string"]},
                        )
                    }
                },
            },
            "responses": {"200": _JOBS, "413": _EITHER, **_READ_ANSWERS},
        },
    },
    "/api/2/deletions/users/{amplitude_id}/{day}": {
        "delete": {
            "summary": "Take a user out of a job that has not begun",
            "parameters": [
                {"name": "amplitude_id", "in": "path", "required": True, "schema": _INT},
                {
                    "name": "day",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "format": "date"},
                },
            ],
            "responses": {
                "200": _json({"type": "object"}, "who was taken out"),
                "404": _EITHER,
                **_READ_ANSWERS,
            },
        }
    },
}

_SETTINGS = _object(
    limits={"type": "object", "description": "those that differ: docs/limits.md names them all"},
    silenced_devices=_list(_TEXT),
    property_time={"type": "string", "enum": ["arrival", "event"]},
    merge_always=_list(_TEXT),
)
_SHOWN = _json(
    _object(
        ("app", "name", "limits", "settings"),
        app=_INT,
        name=_TEXT,
        limits={"type": "object"},
        settings=_SETTINGS,
    ),
    "the project; `limits` as they hold, `settings` as they were given",
)
_PROJECT: Json = {
    "/api/1/project": {
        **_read("The limits and silenced devices of the project", _SHOWN),
        "put": {
            "summary": "Replace the settings of the project; they hold from the next request on",
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _SETTINGS}},
            },
            "responses": {"200": _SHOWN, "413": _EITHER, **_READ_ANSWERS},
        },
    },
    "/api/1/project/rows": _read(
        "How many rows the project holds",
        _json(
            _object(("rows", "live"), rows=_INT, live=_INT),
            "rows of every kind, identify calls and aliases too; `live`: those that came with no import",
        ),
    ),
}

_NULLABLE_INT: Json = {"type": ["integer", "null"]}
_IMPORT = _object(
    (
        "name",
        "state",
        "generation",
        "opened_ms",
        "events",
        "identifies",
        "people",
        "first_event_ms",
        "last_event_ms",
        "first_arrival_ms",
        "last_arrival_ms",
        "duplicates",
        "refusals",
        "tries",
        "reason",
    ),
    name=_TEXT,
    state={"enum": ["open", "closed", "undoing", "undone", "restoring"]},
    generation=_INT,
    opened_ms=_NULLABLE_INT,
    events=_INT,
    identifies=_INT,
    people=_INT,
    first_event_ms=_NULLABLE_INT,
    last_event_ms=_NULLABLE_INT,
    first_arrival_ms=_NULLABLE_INT,
    last_arrival_ms=_NULLABLE_INT,
    duplicates=_INT,
    refusals=_INT,
    tries=_INT,
    reason={"type": ["string", "null"]},
)
_ONE_IMPORT = _json(_IMPORT, "the import")
_IMPORT_ID: Json = {"name": "id", "in": "path", "required": True, "schema": _TEXT}
_IMPORTS: Json = {
    "/api/1/imports": {
        **_read(
            "The imports of the project, those that did something last first",
            _json(_object(("imports",), imports=_list(_IMPORT)), "imports"),
        ),
        "post": {
            "summary": "Open an import; again changes nothing",
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": _object(
                            ("name",),
                            name={"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
                        )
                    }
                },
            },
            "responses": {
                "200": _ONE_IMPORT,
                "409": _json("Problem", "it is being undone"),
                "413": _EITHER,
                **_READ_ANSWERS,
            },
        },
    },
    "/api/1/imports/{id}": {
        **_read("One import", _ONE_IMPORT, _IMPORT_ID, _404=_EITHER),
        "delete": {
            "summary": "Undo an import with all its effects; again changes nothing",
            "parameters": [_IMPORT_ID],
            "responses": {
                "200": _ONE_IMPORT,
                "404": _EITHER,
                "409": _json("Problem", "it was called off, or another one has failed too often"),
                **_READ_ANSWERS,
            },
        },
    },
    "/api/1/imports/{id}/effects": _read(
        "What an undo of the import will change in others",
        _json(
            _object(
                ("only_here", "first_seen", "properties", "merges", "repeats"),
                only_here=_INT,
                first_seen=_INT,
                properties=_INT,
                merges=_INT,
                repeats=_INT,
            ),
            "people, merges and events",
        ),
        _IMPORT_ID,
        _404=_EITHER,
    ),
    "/api/1/imports/{id}/cancel": {
        "post": {
            "summary": "Call off an undo or restore that has changed nothing yet",
            "parameters": [_IMPORT_ID],
            "responses": {
                "200": _ONE_IMPORT,
                "404": _EITHER,
                "409": _json("Problem", "nothing is under way, or it is nearly done"),
                **_READ_ANSWERS,
            },
        }
    },
    "/api/1/imports/{id}/restore": {
        "post": {
            "summary": "Bring an undone import back",
            "parameters": [_IMPORT_ID],
            "responses": {
                "200": _ONE_IMPORT,
                "404": _EITHER,
                "409": _json("Problem", "it is not undone, too long ago, or sent again since"),
                **_READ_ANSWERS,
            },
        }
    },
    "/api/1/imports/{id}/close": {
        "post": {
            "summary": "Note that all of an import was sent",
            "parameters": [_IMPORT_ID],
            "responses": {
                "200": _ONE_IMPORT,
                "404": _EITHER,
                "409": _json("Problem", "it is undone, or being undone"),
                **_READ_ANSWERS,
            },
        }
    },
    "/api/1/imports/{id}/export": _read(
        "All events of an import, in order of arrival", _ZIP, _IMPORT_ID, _404=_EITHER
    ),
}

_CAUSE = _object(
    ("rule", "means", "operations", "merge", "needed", "event", "imported_by", "request"),
    rule={"enum": sorted(RULES)},
    means=_TEXT,
    before={},
    after={},
    operations=_list(_object(("operation", "value"), operation=_TEXT, value={})),
    merge={
        "oneOf": [
            {"type": "null"},
            _object(("absorbed", "surviving"), absorbed=_INT, surviving=_INT, value={}),
        ]
    },
    needed={"type": ["boolean", "null"]},
    event=_object(
        ("uuid", "event_type", "amplitude_id", "event_time_ms"),
        uuid=_TEXT,
        event_type=_TEXT,
        amplitude_id=_INT,
        user_id=_NULLABLE_TEXT,
        device_id=_NULLABLE_TEXT,
        insert_id=_NULLABLE_TEXT,
        event_time_ms=_INT,
    ),
    imported_by=_NULLABLE_TEXT,
    request=_object(
        ("path", "server_upload_time_ms", "block", "row"),
        path=_TEXT,
        server_upload_time_ms=_INT,
        block=_INT,
        row=_INT,
    ),
)
_MERGE = _object(
    ("id", "state", "absorbed", "surviving", "uuid"),
    id={"type": "string", "pattern": "^[0-9]+-[0-9]+$"},
    state={"enum": ["merged", "unmerged"]},
    absorbed=_INT,
    surviving=_INT,
    user_id=_NULLABLE_TEXT,
    device_id=_NULLABLE_TEXT,
    uuid=_TEXT,
    event_type=_NULLABLE_TEXT,
    insert_id=_NULLABLE_TEXT,
    event_time_ms=_NULLABLE_INT,
    server_upload_time_ms=_NULLABLE_INT,
    imported_by=_NULLABLE_TEXT,
    unmerged_ms=_NULLABLE_INT,
)
_HELD = _object(
    ("user_id", "amplitude_id", "merged", "devices", "events", "allowed"),
    user_id=_TEXT,
    amplitude_id=_INT,
    merged=_INT,
    devices=_INT,
    events=_INT,
    first_event_time_ms=_INT,
    last_event_time_ms=_INT,
    last_server_upload_time_ms=_INT,
    allowed=_BOOL,
)
_MERGES: Json = {
    "/api/1/merges": _read(
        "Merges, the newest first",
        _json(_object(("merges",), merges=_list(_MERGE)), "merges"),
        _query("state", {"enum": ["merged", "unmerged"]}),
        _query("amplitude_id", _TEXT, text="that was absorbed, or that survived"),
        _query("user_id", _TEXT),
        _query("before", _TEXT, text="the id of a merge: those before it"),
        _query("limit", {"type": "integer", "minimum": 1, "maximum": MERGES_LISTED_MAX}),
        _404=_EITHER,
    ),
    "/api/1/merges/held": _read(
        "Users who join more people than the project allows, those with most devices first",
        _json(_object(("held",), held=_list(_HELD)), "user_ids to be reviewed"),
        _query("limit", {"type": "integer", "minimum": 1, "maximum": MERGES_LISTED_MAX}),
    ),
    "/api/1/merges/{id}": {
        "delete": {
            "summary": "Take a merge back; again changes nothing",
            "parameters": [{"name": "id", "in": "path", "required": True, "schema": _TEXT}],
            "responses": {"200": _json(_MERGE, "the merge"), "404": _EITHER, **_READ_ANSWERS},
        }
    },
    "/api/1/merges/{id}/restore": {
        "post": {
            "summary": "Let a merge taken back stand again; again changes nothing",
            "parameters": [{"name": "id", "in": "path", "required": True, "schema": _TEXT}],
            "responses": {
                "200": _json(_object(("merges",), merges=_list(_MERGE)), "the merge, if it stands"),
                "404": _EITHER,
                **_READ_ANSWERS,
            },
        }
    },
}
_WHY: Json = {
    "/api/1/why": _read(
        "The events, imports, requests and rules that made a value",
        _json(
            _object(
                ("value", "amplitude_id", "user_id", "causes", "left_out", "rows", "tried"),
                value={},
                amplitude_id=_NULLABLE_INT,
                user_id=_NULLABLE_TEXT,
                causes=_list(_CAUSE),
                left_out=_INT,
                rows=_INT,
                tried=_BOOL,
            ),
            "the value and its causes, in order of arrival",
        ),
        _query("property", _TEXT),
        _query("column", _TEXT, text="a built-in column, as platform"),
        _query("first_seen", {"enum": ["false", "true"]}),
        _query("merge", _TEXT, text="the amplitude_id that was absorbed"),
        _query("group_type", _TEXT),
        _query("group_value", _TEXT),
        _query("user_id", _TEXT),
        _query("device_id", _TEXT),
        _query("amplitude_id", _TEXT),
        _query("uuid", _TEXT, text="of an event"),
        _query("insert_id", _TEXT, text="of an event"),
        _404=_EITHER,
        _413=_EITHER,
    )
}

_HEALTH = _object(
    ("status", "service", "version"), status=_TEXT, service=_TEXT, version=_TEXT, reason=_TEXT
)
_ADMIN: Json = {
    "/healthz": {
        "get": {
            "summary": "Whether reads and writes work",
            "security": [],
            "responses": {"200": _json(_HEALTH, "they do"), "503": _json(_HEALTH, "the reason")},
        }
    },
    "/metrics": {
        "get": {
            "summary": "Figures for Prometheus",
            "security": [],
            "responses": {"200": _text("figures"), "503": _EITHER},
        }
    },
    "/openapi.json": {
        "get": {
            "summary": "This description",
            "security": [],
            "responses": {"200": _json({"type": "object"}, "OpenAPI 3.1")},
        }
    },
}


def description() -> Json:
    """Return the description as JSON values."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Retrofill",
            "version": __version__,
            "description": "Event ingestion and read APIs as Amplitude's clients expect them."
            " Not affiliated with Amplitude.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"keys": []}],
        "paths": {
            **_INGEST,
            **_READ,
            **_DELETIONS,
            **_PROJECT,
            **_IMPORTS,
            **_MERGES,
            **_WHY,
            **_ADMIN,
        },
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {
                "keys": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "API key as the user, secret key as the password",
                }
            },
        },
    }
