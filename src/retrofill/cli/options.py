"""Options that several commands take: the same word means the same in each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Sources = Annotated[
    list[str], Argument(metavar="SOURCE…", help="Files, folders, globs, s3://, databases.")
]
Query = Annotated[str | None, Option(help="The SQL whose rows are the source, for a database.")]
Endpoint = Annotated[str | None, Option(help="Endpoint of S3-compatible storage.")]
Mapping = Annotated[str | None, Option("--map", help="A mapping file or a preset; else what fits.")]
To = Annotated[str, Option(help="amplitude, amplitude-eu or a URL.")]
Server = Annotated[str, Option("--to", help="URL of a Retrofill server.")]
Work = Annotated[Path, Option(help="Directory of stage, journal and dead letters.")]
ImportName = Annotated[str | None, Option("--import", help="The import's name.")]

ApiKey = Annotated[str | None, Option(help="Also RETROFILL_API_KEY.")]
SecretKey = Annotated[str | None, Option(help="Also RETROFILL_SECRET_KEY.")]
KeyFile = Annotated[Path | None, Option(help="File with api_key=… and secret_key=….")]

Since = Annotated[str | None, Option(help="Leave out events before this time.")]
Until = Annotated[
    str | None,
    Option(help="Leave out events from this time on; live: from their type's first on."),
]
LiveExport = Annotated[
    str | None, Option("--live", help="An export of the destination, for --until live.")
]
Sample = Annotated[str | None, Option(metavar="N%", help="A part of the people.")]
SkipSync = Annotated[
    bool | None,
    Option(
        help="Keep live user properties as they are. On unless nothing is live, or it goes by event time."
    ),
]
KioskLimit = Annotated[int, Option(help="An id of more people joins nobody.")]
MinIdLength = Annotated[int, Option(min=1, help="Shorter ids are none.")]
BadRows = Annotated[str, Option(help="Part of the rows that may be refused.")]

ProfileName = Annotated[
    str | None, Option("--profile", help="amplitude, amplitude-enterprise, retrofill.")
]
EventsPerS = Annotated[int | None, Option(help="Over all; 0 = no limit.")]
RequestsPerS = Annotated[int | None, Option(help="Over all.")]
DevicePerS = Annotated[int | None, Option(help="Events of one device.")]
UserPerS = Annotated[int | None, Option(help="Events of one user.")]
EventsPerRequest = Annotated[int | None, Option(help="1 to 2000.")]
QuotaPerDay = Annotated[int | None, Option(help="Events of one id in 24 h.")]
UpdatesPerH = Annotated[int | None, Option(help="Property updates of one person.")]

Yes = Annotated[bool, Option("--yes", "-y", help="Do not ask.")]
AsJson = Annotated[bool, Option("--json", help="JSON, one object a line.")]
