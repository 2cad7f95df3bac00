"""Every number that bounds something, with its unit and its source.

Two kinds. `Limits` are the rules of the wire, one set a project, changed by the operator; a rate or quota of 0 is off.
The constants below bound our own memory, files and queues. "Contract" names a section of the wire contract that
docs/limits.md repeats; "ours" means nobody else's number.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Profile = Literal["amplitude", "starter", "none"]

MS_PER_S = 1000
MS_PER_HOUR = 3_600_000
MS_PER_DAY = 86_400_000

# What an operator may set at all, ours: no value of one project may stop or slow down the others.
RATE_MAX = 1_000_000_000  # any rate, quota or number of updates
WINDOW_S_MAX = 3600  # ids are remembered for one window
REQUEST_BYTES_MAX = 128 * 1024 * 1024  # any body: half of all that may wait
REQUEST_EVENTS_MAX = 10_000  # events, mappings or groups of one request: a block holds it whole
DEDUPE_DAYS_MAX = 366

_Rate = Annotated[int, Meta(ge=0, le=RATE_MAX)]
_Bytes = Annotated[int, Meta(ge=1, le=REQUEST_BYTES_MAX)]
_Count = Annotated[int, Meta(ge=1, le=REQUEST_EVENTS_MAX)]


class Limits(Struct, frozen=True):
    """The limits of one project. Rates in events per second, 0 = off. Source: contract, ingest 3, read 7."""

    httpapi_eps: _Rate = 30  # each device and each user on /2/httpapi
    batch_eps: _Rate = 1000  # each device and each user on /batch
    legacy_eps: _Rate = 10  # each device and each user on /httpapi and POST /
    identify_eps: _Rate = 30  # each device and each user on /identify
    usermap_per_s: _Rate = 50  # mappings of a project on /usermap
    window_s: Annotated[int, Meta(ge=1, le=WINDOW_S_MAX)] = (
        30  # a rate is the mean over this window
    )
    project_eps: _Rate = 0  # all events of a project; 1000 for `starter`
    project_requests_per_s: _Rate = 0  # all requests of a project; 100 for `starter`
    daily_quota: _Rate = 500_000  # stored rows of a device or user in 24 rolling hours of 1 h steps
    property_updates_per_h: _Rate = 1800  # of one amplitude_id, rolling hour of server time
    merges_per_user: _Rate = 500  # people whom one user_id may absorb; ours, decision 0017
    export_bytes: Annotated[int, Meta(ge=0, le=2**63 - 1)] = (
        4_000_000_000  # estimated size of one export answer
    )
    httpapi_bytes: _Bytes = 1024 * 1024  # "1 MB", the larger reading; after decompression
    batch_bytes: _Bytes = 20 * 1024 * 1024
    identify_bytes: _Bytes = 1024 * 1024
    batch_events: _Count = 2000  # events of one request, every endpoint
    usermap_mappings: _Count = 2000
    group_identifies: _Count = 1024
    id_length_min: Annotated[int, Meta(ge=0, le=1024)] = 5
    ids_short: Literal["contract", "reject", "drop"] = (
        "contract"  # 400 on /2/httpapi, drop on /batch
    )
    dedupe_window_ms: Annotated[int, Meta(ge=0, le=DEDUPE_DAYS_MAX * MS_PER_DAY)] = 7 * MS_PER_DAY
    dedupe_scope: Literal["project+device", "project"] = "project+device"
    dedupe_triple: bool = True  # event_id + time + device_id where there is no insert_id
    deletion_days: Annotated[int, Meta(ge=0, le=30)] = 14  # from a request to its job, 0: at once
    deletions_per_s: _Rate = 1  # requests to delete people
    strict_event_types: bool = False  # refuse the six reserved names


PROFILES: dict[str, Limits] = {
    "amplitude": Limits(),
    "starter": Limits(project_eps=1000, project_requests_per_s=100),
    "none": Limits(
        httpapi_eps=0,
        batch_eps=0,
        legacy_eps=0,
        identify_eps=0,
        usermap_per_s=0,
        daily_quota=0,
        property_updates_per_h=0,
        merges_per_user=0,
        deletions_per_s=0,
        export_bytes=0,
    ),
}

# Events. Source: contract, events 4 and 5.
STRING_CHARS_MAX = 1024
ARRAY_ITEM_CHARS_MAX = 10_000  # an array grown by append or prepend, all its text
DEPTH_MAX = 40  # containers inside one another in one property object
GROUP_TYPES_MAX = 5
GROUP_VALUES_MAX = 10
GROUP_PROPERTIES_MAX = 1024  # of one group identify. Source: contract, ingest 3a
CLOCK_SKEW_MS = 60_000  # a smaller difference does not move event_time
# Ours: a later time cannot be told from a mistake in unit, and must fit a signed 64-bit column in microseconds.
TIME_MS_MAX = 253_402_300_799_999

# Reading a request, ours: decoding a small value costs some 60 bytes, so 20 MB of nothing but brackets would cost a GB.
BODY_CONTAINERS_MAX = 400_000  # objects and arrays in a body over 1 MiB; beyond it 413
BODY_VALUES_MAX = 3_000_000  # commas in a body over 1 MiB; beyond it 413
ALIKE_MAX = (
    32_768  # texts of `user_properties` that came twice and are kept decoded; then it begins anew
)
ALIKE_BYTES_MAX = 1024  # of such a text; a longer one is decoded each time
ALIKE_TOTAL_BYTES = 8 * 1024 * 1024  # of all of them; nothing but brackets takes 22 times that
COLUMNS_ALIKE_MAX = (
    4_096  # built-in columns of people that came twice and are kept once for all of them
)
SCAN_TOKENS_MAX = 300_000  # tokens looked at one by one in a body that no decoder takes
KEY_CHARS_MAX = 200  # of an unknown API key, repeated in the answer

# The way of an event, ours.
BLOCK_EVENTS_MAX = 2000  # a micro-batch closes at this many events
QUEUE_BYTES_MAX = 256 * 1024 * 1024  # request bodies that wait for their commit; beyond it 503
QUEUE_REQUESTS_MAX = 10_000
REFOLD_ROWS = 20_000  # rows folded again at a time, when an import is undone
LATE_MARKS_MAX = 20_000  # people and groups that late events have marked; from here on they are folded again at once
LATE_MARKS_KEPT = 200_000  # of them, where a change of history has to end first; of more the whole project counts as marked
REFOLD_FILE_ROWS = 300_000  # rows of each lake file that is written for it
REFOLD_SORT_BYTES = 128 * 1024 * 1024  # of rows to be folded again that are put in order in memory
REFOLD_ASIDE_ROWS = 80_000  # changed rows that are set aside on disk at once
REFOLD_ASIDE_BATCH_ROWS = 1_000  # of these read back at a time, of every piece and file at once
REFOLD_GROUP_ROWS = 4_000  # rows of a run in order read back at a time
REFOLD_OUT_ROWS = 500_000  # rows, of one file at least, that one statement takes out of the lake
REFOLD_OUT_FILES = 200  # files out of which that statement takes them: 256 KB each
REFOLD_PASSES_MAX = 6  # over what was sealed meanwhile; what comes then is folded from blocks
REFOLD_PASS_ROWS = 80_000  # fewer that were sealed meanwhile, too: a seal and a pass take longer than tails of so few
REFOLD_TAILS_MAX = 200  # times that such blocks are folded before commits pause for the rest
REFOLD_TAIL_MAX = 40_000  # rows of such blocks at a time
REFOLD_TAIL_BYTES = 64 * 1024 * 1024  # or bodies and rows' snapshots of this size
REFOLD_TAIL_ROWS = (
    6_000  # rows that may be left for the pause; folding them takes some hundredths of a second
)
REFOLD_TRIES_MAX = (
    3  # times that a change of history is begun, until it is asked for anew or called off
)
REFOLD_LOOK_S = 0.2  # how often it is looked whether more has come, while the lake changes its rows
REFOLD_SHARE = 0.7  # of its time that the commit loop works while history is changed
REFOLD_PACE = 0.6  # of the speed at which history is folded again, for what may come meanwhile
REFOLD_PACE_ROWS = 20_000  # rows by which that speed is measured
REFOLD_PACE_WAIT_S = 0.1  # by which a block is put off for either, at most
REFOLD_ROOM_ROWS = (
    750_000  # with less room than this until SEAL_LAG_EVENTS_MAX, blocks come slower meanwhile
)
REFOLD_ROOM_S = 60  # that the room would last at their rate
REFOLD_ROOM_WAIT_S = 10  # by which a block is put off for it, at most
HISTORY_MEMORY_BYTES = (
    512 * 1024 * 1024
)  # what DuckDB may hold in the child that folds history again
CHECK_KEYS_SHOWN = 3  # dedupe keys without a row that it names for each project and day
CHECK_SHOWN_MAX = 1000  # differences that `retrofill check` names; all are counted
CHECK_TEXT_CHARS = 200  # of a value that it shows
MERGES_LISTED_MAX = (
    1000  # merges in one answer, the newest first; ids that hold people apart, the same
)
HELD_TOLD_MAX = 1000  # ids that hold people apart, named in the log since the start: each once
WHY_ROWS_MAX = 2_000_000  # rows folded for one answer of `why`; beyond it 413
WHY_FOLDED_ROWS_MAX = 60_000  # rows folded to try which of them are needed, all trials of an answer
WHY_CAUSES_MAX = 100  # events of an answer that changed the value, the newest
WHY_IDLE_MAX = 20  # and that said something of it and changed nothing
WHY_TEXTS_KEPT_MAX = 1000  # operations as sent that `why` keeps, with what they say of the value
WHY_PEOPLE_MAX = 1000  # other people on a person's devices whose rows are looked at
UNDO_RETENTION_DAYS = 30  # an undone import can be restored so long; then its rows are deleted
SEAL_EVENTS = 150_000  # blocks become a lake file at this many events
SEAL_AGE_MS = 60_000  # or when the oldest is this old
SEAL_RETRY_MS = (
    5_000  # until a seal that failed is tried again by itself; whoever needs one tries at once
)
SEAL_LAG_EVENTS_MAX = 1_500_000  # unsealed events; beyond it 503 until sealing has caught up
CHECKPOINT_EVENTS = 300_000
CHECKPOINT_AGE_MS = 120_000
BACKGROUND_S = 1  # how often it is looked whether sealing or a checkpoint is due by age
CHILD_ANSWER_BYTES_MAX = 256 * 1024 * 1024  # a line of merges, about 100 bytes each
DELETE_BLOCKS_STEP = 8  # sealed blocks removed in one small transaction
LOG_PAGES = 2_000  # written to the log of hot.sqlite until they go into it, beside the commits
LOG_PAGES_MAX = 8_000  # with so many in the log a commit moves them itself
PEOPLE_IN_MEMORY = 200_000  # clean people kept beside those not yet checkpointed
IDS_IN_MEMORY = 500_000  # device and user ids kept, of each kind
FINGERPRINTS_IN_MEMORY = (
    100_000_000  # dedupe keys in memory, 17 to 27 bytes each; older ones: key files
)
KEY_FILES_MERGED = 10  # small neighbouring key files that become one
KEY_FILE_KEYS_MAX = (
    4_000_000  # keys of a merged file, 20 bytes each; a file over a quarter of it is not small
)
QUOTA_IDS_MAX = 2_000_000  # ids counted for the daily quota
RATE_IDS_MAX = 1_000_000  # ids counted for the 30 s rates

# The lake, ours.
LAKE_MEMORY_BYTES = (
    512 * 1024 * 1024
)  # what DuckDB may hold; beyond it, it spills to the lake's own folder
LAKE_THREADS = 2  # of DuckDB, for all readers together
LAKE_SPILL_BYTES = 20 * 1024 * 1024 * 1024  # what DuckDB may spill
# Rows of a row group: what looking one person up reads of a file at least. Every group also lengthens the footer, which
# every reader of the file has to know, so large files have larger ones.
LAKE_GROUP_ROWS = 8_000
LAKE_LARGE_GROUP_ROWS = 20_000
LAKE_SMALL_FILE_ROWS = 1_250_000  # a file of more rows is a large one
LAKE_SYNC_BYTES = 4 * 1024 * 1024  # written of a lake file or a key file until they are synced
LAKE_MERGES_INLINE = (
    1_000_000_000  # rows of the small tables stay in the catalog, never in files of their own
)
LAKE_FOOTER_BYTES = 8 * 1024 * 1024  # footers kept for readers, as on disk; in memory 15 times that
LAKE_MERGES_KEPT = 200_000  # merges kept for readers, of the last snapshot alone
SEAL_BYTES_MAX = (
    128 * 1024 * 1024
)  # bodies and snapshots of one lake file: bounds the sealer's memory
COMPACT_FILES = 10  # neighbours of one tier that become one file
COMPACT_FILES_MIN = 2  # fewer are merged if they fill a file of the largest size
COMPACT_FILES_LASTING = 12  # a file with more than such a part of all rows is left alone
COMPACT_ROWS_LASTING = 1_250_000  # one of fewer rows is not: as many as ten seals make, nearly
COMPACT_ROWS_MAX = 5_000_000  # rows of the largest file

# HTTP, ours unless a source is named.
KEEP_ALIVE_S = 75  # Node's agent reuses a socket for 5 s: contract, clients 1.5
HEADERS_BYTES_MAX = 64 * 1024
QUERY_BYTES_MAX = 64 * 1024
BODY_IDLE_S = 30  # a request whose body stalls this long is answered 408
BODY_S_MAX = 300  # and one that is not complete after this long
READ_IDLE_S = 60  # a client that takes nothing of its answer for this long is cut off
LINGER_S = 3  # a refused client may go on sending this long before it is cut off
RETRY_AFTER_S = 1  # what a 503 asks for: clients give up after 7 s (contract, clients 1.6)
CONNECTIONS_MAX = 4096  # at once; one more is answered 503
CHORES_S = 60  # how often a server looks for due deletions
STOP_FIRST_S = 3  # after SIGTERM: how long a connection may take to begin its first request
STOP_S_MAX = 20  # requests under way may take this long after SIGTERM
EXPORT_DAYS_MAX = 365  # contract, read 2
CLOCK_BACK_MS = MS_PER_HOUR  # a clock this far behind the last stored event shows in health

# Reads, ours unless a source is named.
UNSEALED_CHUNK_ROWS = 16_384  # rows of unsealed blocks that are built for a reader at a time
UNSEALED_CHUNK_BYTES = 16 * 1024 * 1024  # or bodies of this size
UNSEALED_KEPT_BYTES = 128 * 1024 * 1024  # built rows kept for the next reader
STREAM_BYTES = 64 * 1024  # rows that DuckDB makes ahead of whoever reads them, in its own measure
READ_THREADS = 8  # statements that run at once, all projects
READS_PER_PROJECT = 5  # requests of a project at once: contract, read 1
PERSON_READS_PER_PROJECT = 10  # user search and user activity: contract, read 1
EXPORT_SLICE_BYTES = 8 * 1024 * 1024  # lake rows that an export holds and puts in order at a time
EXPORT_SLICES = 64  # slices whose rows one reading of the lake sets apart
EXPORT_READ_BYTES = 16 * 1024 * 1024  # rows that it reads of the lake at a time, by their mean
EXPORT_RELEASE_SLICES = 2  # after so many slices memory that was freed goes back to the system
EXPORT_CHUNK_ROWS = 4096  # rows that become JSON lines at a time
EXPORT_THREADS = 2  # of one export, that make lines and compress them
EXPORT_CHUNK_BYTES = 8 * 1024 * 1024  # or as many as take so much, more than one
EXPORT_MEMBER_ROWS = 8_192  # lines of one file in the archive
EXPORT_ALONE_S = 300  # for which no merge of lake files begins beside an export
EXPORT_MEMBER_BYTES = 16 * 1024 * 1024  # or rows of this size, before the chunk that goes beyond it
ACTIVITY_EVENTS_MAX = 1000  # contract, read 4
PERSON_LOOKS = (
    2  # at a state that goes by event time; if late events go on coming, commits wait for the next
)
EARNED_BYTES = 16 * 1024 * 1024  # properties of one person's purchases that are added up at a time
MATCHES_MAX = 100  # people in the answer of one user search
CHART_DAYS_MAX = 365  # contract, read 5: daily; 7 days hourly, 2 days by 5 minutes
CHART_YEARS_MAX = 60  # weekly and monthly
CHART_GROUPS_MAX = 1000  # contract, read 5
CHART_CONDITIONS_MAX = 100  # filters, segments and values of one query, each
DELETIONS_PER_PROJECT = 8  # requests of a project at once: contract, read 7
DELETION_BYTES_MAX = 256 * 1024  # body of one request
DELETION_IDS_MAX = 100  # people of one request: contract, read 7
DELETION_FREEZE_DAYS = 3  # a job can no longer be edited this long before its day: contract, read 7
DELETION_RANGE_DAYS_MAX = 184  # six months: contract, read 7
IMPORTS_LISTED_MAX = 1000  # imports in one answer, those that did something last
IMPORTS_REFUSED_MAX = 10_000  # names whose refused requests are counted until they are saved
IMPORT_BYTES_MAX = 4096  # body of POST /api/1/imports
HISTORY_IDS_MAX = 500_000  # device_ids, user_ids and contacts of one POST /api/1/history
HISTORY_KEYS_MAX = 200_000  # insert_keys of one
HISTORY_BYTES_MAX = 64 * 1024 * 1024  # its body
HISTORY_ROWS = 10_000  # lines of its answer that are made at a time
HISTORY_ALIKE_MAX = 10_000  # people named in one answer who may be one under another id
SETTINGS_BYTES_MAX = 1024 * 1024  # body of PUT /api/1/project: about 20,000 silenced devices
