"""Each preset on rows shaped as its source really writes them. Source of the mappings: contract, migrate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.backfill.staging import events, letters, ndjson, run

from retrofill.backfill import manifest as manifests
from retrofill.backfill import mapping_file, plan
from retrofill.backfill.profile import PROFILES

SKIP = {"$skip_user_properties_sync": True}
Json = dict[str, Any]


def staged(tmp_path: Path, preset: str, rows: list[Json]) -> list[Json]:
    run(tmp_path / "work", ndjson(tmp_path / "source.ndjson", rows), preset)
    assert letters(tmp_path / "work") == []
    return events(tmp_path / "work")


def test_every_source_of_the_contract_has_its_preset() -> None:
    expected = ["amplitude-export", "ga4", "mixpanel", "posthog", "segment", "signups", "snowplow"]
    assert mapping_file.presets() == expected


EXPORTED: Json = {
    "$insert_id": "7f1c9d0e-1",
    "$insert_key": None,
    "$schema": None,
    "adid": None,
    "amplitude_attribution_ids": None,
    "amplitude_event_type": None,
    "amplitude_id": 597609329123,
    "app": 243704,
    "city": "San Francisco",
    "client_event_time": "2025-03-01 10:00:05.123000",
    "client_upload_time": "2025-03-01 10:00:07.000000",
    "country": "United States",
    "data": {
        "path": "/batch",
        "user_properties_updated": True,
        "group_first_event": {},
        "group_ids": {},
    },
    "data_type": "event",
    "device_brand": None,
    "device_carrier": "AT&T",
    "device_family": "Apple iPhone",
    "device_id": "5B1F5C5A-1D2E-5F00-A111-000000000001",
    "device_manufacturer": None,
    "device_model": "iPhone14,2",
    "device_type": "Apple iPhone 13",
    "dma": "San Francisco-Oakland-San Jose, CA",
    "event_id": 12,
    "event_properties": {"page": "home", "$revenue": 9.5, "tags": ["a", "b"]},
    "event_time": "2025-03-01 10:00:03.999999",
    "event_type": "Checkout",
    "global_user_properties": None,
    "group_properties": {},
    "groups": {"org": ["acme"]},
    "idfa": None,
    "ip_address": "203.0.113.9",
    "is_attribution_event": None,
    "language": "English",
    "library": "amplitude-ts/2.1.0",
    "location_lat": 37.5,
    "location_lng": -122.0,
    "os_name": "ios",
    "os_version": "17.1",
    "partner_id": None,
    "paying": None,
    "plan": {},
    "platform": "iOS",
    "processed_time": "2025-03-01 10:00:08.000000",
    "region": "California",
    "sample_rate": None,
    "server_received_time": "2025-03-01 10:00:06.000000",
    "server_upload_time": "2025-03-01 10:00:06.050000",
    "session_id": 1740823200000,
    "source_id": None,
    "start_version": None,
    "user_creation_time": None,
    "user_id": "user-1",
    "user_properties": {"plan": "pro", "n": 3},
    "uuid": "0d2f5b8a-0000-4000-8000-000000000001",
    "version_name": "3.2.1",
}


def test_an_exported_row_becomes_the_event_it_was(tmp_path: Path) -> None:
    found = staged(tmp_path, "amplitude-export", [EXPORTED])
    assert found == [
        {
            **SKIP,
            "insert_id": "7f1c9d0e-1",
            "event_type": "Checkout",
            "user_id": "user-1",
            "device_id": "5B1F5C5A-1D2E-5F00-A111-000000000001",
            "time": 1740823203999,
            "session_id": 1740823200000,
            "event_id": 12,
            "platform": "iOS",
            "os_name": "ios",
            "os_version": "17.1",
            "device_model": "iPhone14,2",
            "carrier": "AT&T",
            "country": "United States",
            "region": "California",
            "city": "San Francisco",
            "dma": "San Francisco-Oakland-San Jose, CA",
            "language": "English",
            "app_version": "3.2.1",
            "ip": "203.0.113.9",
            "library": "amplitude-ts/2.1.0",
            "location_lat": 37.5,
            "location_lng": -122.0,
            "event_properties": {"page": "home", "$revenue": 9.5, "tags": ["a", "b"]},
            "user_properties": {"plan": "pro", "n": 3},
            "groups": {"org": ["acme"]},
        }
    ]


def test_a_device_that_has_only_a_family_keeps_it_as_a_property(tmp_path: Path) -> None:
    named = {**EXPORTED, "device_model": None, "event_properties": None}
    (event,) = staged(tmp_path, "amplitude-export", [named])
    assert event["event_properties"] == {
        "device_family": "Apple iPhone",
        "device_type": "Apple iPhone 13",
    }


def test_an_exported_row_without_insert_id_takes_its_uuid_and_derived_events_stay_out(
    tmp_path: Path,
) -> None:
    bare = {
        "event_type": "Open",
        "event_time": "2020-01-02 03:04:05.000000",
        "user_id": None,
        "device_id": "device-1",
        "session_id": -1,
        "$insert_id": None,
        "uuid": "0d2f5b8a-0000-1000-8000-000000000002",
    }
    derived = {**bare, "event_type": "[Amplitude] Revenue", "uuid": "other"}
    assert staged(tmp_path, "amplitude-export", [bare, derived]) == [
        {
            **SKIP,
            "insert_id": "0d2f5b8a-0000-1000-8000-000000000002",
            "event_type": "Open",
            "device_id": "device-1",
            "time": 1577934245000,
        }
    ]


def test_mixpanel(tmp_path: Path) -> None:
    web = {
        "event": "$mp_web_page_view",
        "properties": {
            "time": 1702551600,
            "distinct_id": "user-77",
            "$insert_id": "c7a3e0",
            "$device_id": "18c67a-device",
            "$user_id": "user-77",
            "$browser": "Chrome",
            "$browser_version": 120,
            "$os": "Mac OS X",
            "$city": "Berlin",
            "$region": "Berlin",
            "mp_country_code": "DE",
            "mp_lib": "web",
            "$lib_version": "2.47.0",
            "$current_url": "https://example.com/a",
            "$initial_referrer": "$direct",
            "utm_source": "news",
            "mp_processing_time_ms": 1702551601000,
            "Plan": "pro",
        },
    }
    anonymous = {
        "event": "App Open",
        "properties": {
            "time": 1702551600123,
            "distinct_id": "$device:abcdef-123",
            "$insert_id": "c7a3e1",
            "$os": "Android",
            "$os_version": "14",
            "$brand": "google",
            "$manufacturer": "Google",
            "$model": "Pixel 8",
            "$carrier": "O2",
            "$app_version_string": "5.0",
            "mp_lib": "android",
        },
    }
    assert staged(tmp_path, "mixpanel", [web, anonymous]) == [
        {
            **SKIP,
            "insert_id": "user-77:c7a3e0",
            "event_type": "Page Viewed",
            "user_id": "user-77",
            "device_id": "18c67a-device",
            "time": 1702551600000,
            "platform": "Web",
            "os_name": "Chrome",
            "os_version": "120",
            "country": "Germany",
            "region": "Berlin",
            "city": "Berlin",
            "library": "web/2.47.0",
            "user_properties": {"initial_referrer": "$direct"},
            "event_properties": {
                "$current_url": "https://example.com/a",
                "utm_source": "news",
                "Plan": "pro",
            },
        },
        {
            **SKIP,
            "insert_id": "$device:abcdef-123:c7a3e1",
            "event_type": "App Open",
            "device_id": "abcdef-123",
            "time": 1702551600123,
            "platform": "Android",
            "os_name": "Android",
            "os_version": "14",
            "device_brand": "google",
            "device_manufacturer": "Google",
            "device_model": "Pixel 8",
            "carrier": "O2",
            "app_version": "5.0",
            "library": "android",
        },
    ]


def test_segment(tmp_path: Path) -> None:
    context = {
        "app": {"version": "2.0"},
        "device": {
            "id": "B5372DB0-C21E-11E4-8DFC-AA07A5B093DB",
            "type": "ios",
            "manufacturer": "Apple",
            "model": "iPhone7,2",
            "advertisingId": "7A3CBEA0-BDF5-11E4-8DFC-AA07A5B093DB",
        },
        "ip": "8.8.8.8",
        "library": {"name": "analytics-ios", "version": "4.1"},
        "locale": "en-US",
        "network": {"carrier": "T-Mobile", "wifi": True},
        "os": {"name": "iPhone OS", "version": "8.1.3"},
        "campaign": {"source": "Newsletter", "name": "TPS"},
        "traits": {"plan": "pro"},
        "location": {
            "country": "US",
            "city": "San Francisco",
            "latitude": 40.25,
            "longitude": -70.0,
        },
    }
    track = {
        "type": "track",
        "messageId": "022bb90c-bbac-11e4-8dfc-aa07a5b093db",
        "anonymousId": "507f191e810c19729de860ea",
        "userId": "97980cfea0067",
        "event": "Order Completed",
        "timestamp": "2015-02-23T22:28:55.111Z",
        "properties": {"revenue": 19.5, "currency": "USD", "products": [{"sku": "x"}]},
        "context": context,
        "integrations": {"Actions Amplitude": {"session_id": 1424730000000}},
    }
    page = {
        "type": "page",
        "messageId": "page-1",
        "anonymousId": "507f191e810c19729de860ea",
        "name": "Home",
        "timestamp": "2015-02-23T22:30:00Z",
        "properties": {"path": "/"},
        "context": {"library": {"name": "analytics.js", "version": "2.11"}},
    }
    identify = {
        "type": "identify",
        "messageId": "identify-1",
        "userId": "97980cfea0067",
        "timestamp": "2015-02-23T22:31:00Z",
        "traits": {"email": "p@example.com"},
    }
    deleted = {"type": "delete", "messageId": "delete-1", "userId": "97980cfea0067"}
    found = staged(tmp_path, "segment", [track, page, identify, deleted])
    assert found == [
        {
            **SKIP,
            "insert_id": "022bb90c-bbac-11e4-8dfc-aa07a5b093db",
            "event_type": "Order Completed",
            "user_id": "97980cfea0067",
            "device_id": "B5372DB0-C21E-11E4-8DFC-AA07A5B093DB",
            "time": 1424730535111,
            "session_id": 1424730000000,
            "platform": "iOS",
            "os_name": "iPhone OS",
            "os_version": "8.1.3",
            "device_manufacturer": "Apple",
            "device_model": "iPhone7,2",
            "idfa": "7A3CBEA0-BDF5-11E4-8DFC-AA07A5B093DB",
            "carrier": "T-Mobile",
            "country": "United States",
            "city": "San Francisco",
            "location_lat": 40.25,
            "location_lng": -70.0,
            "language": "en-US",
            "ip": "8.8.8.8",
            "app_version": "2.0",
            "library": "analytics-ios/4.1",
            "revenue": 19.5,
            "currency": "USD",
            "event_properties": track["properties"],
            "user_properties": {"plan": "pro", "utm_source": "Newsletter", "utm_campaign": "TPS"},
        },
        {
            **SKIP,
            "insert_id": "page-1",
            "event_type": "Viewed Home Page",
            "device_id": "507f191e810c19729de860ea",
            "time": 1424730600000,
            "platform": "Web",
            "library": "analytics.js/2.11",
            "event_properties": {"path": "/"},
        },
        {
            **SKIP,
            "insert_id": "identify-1",
            "event_type": "$identify",
            "user_id": "97980cfea0067",
            "time": 1424730660000,
            "user_properties": {"email": "p@example.com"},
        },
    ]


GROUP: Json = {
    "type": "group",
    "messageId": "group-1",
    "userId": "97980cfea0067",
    "anonymousId": "507f191e810c19729de860ea",
    "groupId": "0e8c78ea9d97a7b8185e8632",
    "timestamp": "2015-02-23T22:32:00Z",
    "traits": {"name": "Initech", "employees": 329},
    "context": {"traits": {"plan": "pro"}, "campaign": {"source": "Newsletter"}},
}


def test_a_group_call_of_segment_puts_the_user_in_and_says_what_the_group_is_like(
    tmp_path: Path,
) -> None:
    alias = {"type": "alias", "messageId": "alias-1", "userId": "97980cfea0067"}
    alias |= {"previousId": "old-device-1", "timestamp": "2015-02-23T22:33:00Z"}
    nothing = [{**GROUP, "groupId": None}, {**alias, "previousId": None}]
    joined, described, known = sorted(
        staged(tmp_path, "segment", [GROUP, alias, *nothing]),
        key=lambda event: event["insert_id"] != "group-1",
    )
    assert joined == {
        **SKIP,
        "insert_id": "group-1",
        "event_type": "$identify",
        "user_id": "97980cfea0067",
        "device_id": "507f191e810c19729de860ea",
        "time": 1424730720000,
        "groups": {"[Segment] Group": "0e8c78ea9d97a7b8185e8632"},
        "user_properties": {
            "[Segment] Group": "0e8c78ea9d97a7b8185e8632",
            "utm_source": "Newsletter",
        },
    }
    stage = tmp_path / "work" / "stage"
    found = manifests.read(stage)
    assert found is not None
    assert (found.events, found.people) == (3, 1)
    planned = plan.plan(found, PROFILES["amplitude"], destination="x", stage=stage)
    names = {one.name for one in planned.hot_people}
    assert names == {"97980cfea0067", "nobody, calls about groups"}
    assert described == {
        **SKIP,
        "insert_id": "group-1:group",
        "event_type": "$groupidentify",
        "time": 1424730720000,
        "groups": {"[Segment] Group": "0e8c78ea9d97a7b8185e8632"},
        "group_properties": {"$set": {"name": "Initech", "employees": 329}},
    }
    assert known == {
        **SKIP,
        "insert_id": "alias-1",
        "event_type": "$identify",
        "user_id": "97980cfea0067",
        "device_id": "old-device-1",
        "time": 1424730780000,
    }


def test_a_group_call_of_segment_without_traits_says_nothing_of_the_group(tmp_path: Path) -> None:
    (joined,) = staged(tmp_path, "segment", [{**GROUP, "traits": None}])
    assert (joined["event_type"], joined["insert_id"]) == ("$identify", "group-1")


def _joining(event: str, **properties: Any) -> Json:
    return {"event": event, "properties": {"time": 1700000000, **properties}}


ANON, OTHER = "18c2a4f1d3e-0a1b2c3d-4e5f6a7b-1fa400-18c2a4f1d3f", "18c2a4f1d3e-0b-4e5f-1fa4-18c2a"
JOINING = [
    # As the browser's library sends it, and as the HTTP API takes it.
    (_joining("$identify", distinct_id="user-9", **{"$anon_distinct_id": f"$device:{ANON}"}), True),
    (_joining("$identify", **{"$identified_id": "user-9", "$anon_id": ANON}), True),
    # mixpanel.alias("user-9"): what was anonymous gets a name, or the other way about.
    (_joining("$create_alias", distinct_id=ANON, alias="user-9"), True),
    (_joining("$create_alias", distinct_id="user-9", alias=f"$device:{ANON}"), True),
    (_joining("$create_alias", distinct_id="user-9", alias="user-10"), False),
    (_joining("$create_alias", distinct_id=ANON, alias=OTHER), False),
    (_joining("$merge", **{"$distinct_ids": ["user-9", "user-10"]}), False),
]


def test_mixpanel_joins_what_was_anonymous_to_its_user(tmp_path: Path) -> None:
    found = staged(tmp_path, "mixpanel", [row for row, _joins in JOINING])
    told = {"event_type": "$identify", "user_id": "user-9", "device_id": ANON}
    assert len(found) == sum(joins for _row, joins in JOINING)
    for event in found:
        assert {name: event[name] for name in told} == told
        assert "event_properties" not in event


def _param(key: str, **value: Any) -> Json:
    members = ("string_value", "int_value", "float_value", "double_value")
    return {"key": key, "value": {name: value.get(name) for name in members}}


GA4: Json = {
    "event_date": "20240105",
    "event_timestamp": "1704448800123456",
    "event_name": "purchase",
    "event_params": [
        _param("ga_session_id", int_value="1704448000"),
        _param("page_location", string_value="https://shop.example/cart"),
        _param("value", double_value=25.5),
    ],
    "event_value_in_usd": 25.5,
    "user_id": None,
    "user_pseudo_id": "1234567890.1704448000",
    "user_properties": [_param("tier", string_value="gold")],
    "device": {
        "mobile_brand_name": None,
        "mobile_model_name": None,
        "operating_system": "Windows",
        "operating_system_version": "10",
        "language": "en-us",
        "advertising_id": None,
        "vendor_id": None,
        "web_info": {"browser": "Chrome", "browser_version": "120.0"},
    },
    "geo": {"country": "Canada", "region": "Ontario", "city": "Toronto", "metro": "(not set)"},
    "app_info": {"version": None},
    "traffic_source": {"source": "google", "medium": "organic", "name": "(organic)"},
    "platform": "WEB",
    "ecommerce": {"purchase_revenue": 25.5},
    "items": [{"item_id": "SKU1", "price": 25.5}],
}
GA4_EVENT: Json = {
    **SKIP,
    "event_type": "purchase",
    "device_id": "1234567890.1704448000",
    "time": 1704448800123,
    "session_id": 1704448000000,
    "platform": "Web",
    "os_name": "Chrome",
    "os_version": "120.0",
    "language": "en-us",
    "country": "Canada",
    "region": "Ontario",
    "city": "Toronto",
    "dma": "(not set)",
    "revenue": 25.5,
    "event_properties": {
        "ga_session_id": 1704448000,
        "page_location": "https://shop.example/cart",
        "value": 25.5,
        "items": [{"item_id": "SKU1", "price": 25.5}],
    },
    "user_properties": {
        "tier": "gold",
        "utm_source": "google",
        "utm_medium": "organic",
        "utm_campaign": "(organic)",
    },
}


def test_ga4_from_json_lines(tmp_path: Path) -> None:
    (event,) = staged(tmp_path, "ga4", [GA4])
    assert len(event.pop("insert_id")) == 32
    assert event == GA4_EVENT


def test_ga4_names_what_brought_an_event_before_what_brought_the_person(tmp_path: Path) -> None:
    names = ("manual_source", "manual_medium", "manual_campaign_name", "manual_term")
    collected = {**dict.fromkeys(names), "manual_source": "mail", "manual_term": "shoes"}
    (event,) = staged(tmp_path, "ga4", [{**GA4, "collected_traffic_source": collected}])
    assert event["user_properties"] == {"tier": "gold", "utm_source": "mail", "utm_term": "shoes"}


def test_ga4_from_parquet(tmp_path: Path) -> None:
    typed = {**GA4, "event_timestamp": int(GA4["event_timestamp"])}
    typed["event_params"] = msgspec.json.decode(
        msgspec.json.encode(GA4["event_params"]).replace(b'"1704448000"', b"1704448000")
    )
    pq.write_table(pa.Table.from_pylist([typed]), tmp_path / "ga4.parquet")
    run(tmp_path / "work", tmp_path / "ga4.parquet", "ga4")
    (event,) = events(tmp_path / "work")
    assert len(event.pop("insert_id")) == 32
    assert event == GA4_EVENT


def test_posthog(tmp_path: Path) -> None:
    device = "0190163d-8694-739b-aea5-966c26f8ad90"
    seen = {
        "$device_id": device,
        "$session_id": "0190163d-8694-739b-aea5-966c26f8ad91",
        "$browser": "Firefox",
        "$browser_version": 127,
        "$os": "Linux",
        "$lib": "web",
        "$lib_version": "1.139.1",
        "$ip": "203.0.113.5",
        "$geoip_country_name": "France",
        "$geoip_city_name": "Lyon",
        "$current_url": "https://example.com/",
        "color": "red",
        "$set": {"$os": "Linux", "plan": "pro"},
        "$set_once": {"$initial_referrer": "$direct", "$initial_os": "Linux", "initial_os": "own"},
    }
    view = {
        "uuid": "0190163d-8694-739b-aea5-966c26f8ad92",
        "event": "$pageview",
        "timestamp": "2024-06-14T10:14:09.300Z",
        "distinct_id": device,
        "properties": seen,
    }
    login = {
        "uuid": "0190163d-8694-739b-aea5-966c26f8ad93",
        "event": "$identify",
        "timestamp": "2024-06-14T10:15:00Z",
        "distinct_id": "user-9",
        "properties": {
            "$device_id": device,
            "$anon_distinct_id": device,
            "$set": {"email": "x@example.com"},
            "$set_once": {"first": "a", "$initial_os": "Linux"},
        },
    }
    group = {
        "uuid": "0190163d-8694-739b-aea5-966c26f8ad94",
        "event": "$groupidentify",
        "timestamp": "2024-06-14T10:16:00Z",
        "distinct_id": "user-9",
        "properties": {
            "$group_type": "company",
            "$group_key": "acme",
            "$group_set": {"seats": 5},
        },
    }
    alias = {**view, "event": "$create_alias", "uuid": "x"}
    old = [
        {**view, "uuid": f"o-{n}", "timestamp": f"2024-07-01T10:00:0{n}Z",
         "properties": {**seen, "$session_id": "17f-old"}}
        for n in (3, 1)
    ]  # fmt: skip
    rows = [view, login, group, alias, *old]
    found = staged(tmp_path, "posthog", rows)
    as_text = [one | {"properties": json.dumps(one["properties"])} for one in rows]
    pq.write_table(pa.Table.from_pylist(as_text), tmp_path / "rows.parquet")
    run(tmp_path / "parquet", tmp_path / "rows.parquet", "posthog")
    assert events(tmp_path / "parquet") == found
    first, second, third, *later = sorted(found, key=lambda event: event["time"])
    assert [event["session_id"] for event in later] == [1719828001000] * 2
    assert first == {
        **SKIP,
        "insert_id": "0190163d-8694-739b-aea5-966c26f8ad92",
        "event_type": "Page Viewed",
        "device_id": device,
        "time": 1718360049300,
        "session_id": 1718360049300,
        "platform": "Web",
        "os_name": "Firefox",
        "os_version": "127",
        "country": "France",
        "city": "Lyon",
        "ip": "203.0.113.5",
        "library": "web/1.139.1",
        "event_properties": {"$current_url": "https://example.com/", "color": "red"},
        "user_properties": {"initial_referrer": "$direct", "initial_os": "own", "plan": "pro"},
    }
    assert second == {
        **SKIP,
        "insert_id": "0190163d-8694-739b-aea5-966c26f8ad93",
        "event_type": "$identify",
        "user_id": "user-9",
        "device_id": device,
        "time": 1718360100000,
        "user_properties": {
            "$set": {"email": "x@example.com"},
            "$setOnce": {"first": "a", "initial_os": "Linux"},
        },
    }
    assert third == {
        **SKIP,
        "insert_id": "0190163d-8694-739b-aea5-966c26f8ad94",
        "event_type": "$groupidentify",
        "time": 1718360160000,
        "groups": {"company": "acme"},
        "group_properties": {"$set": {"seats": 5}},
    }


def test_posthog_joins_what_was_anonymous_to_its_user(tmp_path: Path) -> None:
    device, anonymous = "old-uuid-of-a-device", "0190163d-8694-739b-aea5-966c26f8ad90"
    base = {"event": "$create_alias", "timestamp": "2024-06-14T10:14:09Z"}
    rows = [
        {**base, "distinct_id": anonymous, "properties": {"alias": "user-9"}},
        {**base, "distinct_id": "user-9", "properties": {"alias": anonymous}},
        {**base, "distinct_id": device, "properties": {"alias": "user-9", "$device_id": device}},
        {**base, "distinct_id": "user-9", "properties": {"alias": "user-10"}},
        {**base, "distinct_id": anonymous, "properties": {"alias": None}},
        # After a reset the anonymous id is a new one on the same device.
        {**base, "event": "Look", "distinct_id": anonymous,
         "properties": {"$device_id": device, "$is_identified": False}},
    ]  # fmt: skip
    found = staged(tmp_path, "posthog", rows)
    assert [(one["event_type"], one.get("user_id"), one["device_id"]) for one in found] == [
        ("$identify", "user-9", anonymous),
        ("$identify", "user-9", anonymous),
        ("$identify", "user-9", device),
        ("Look", None, device),
    ]


def test_snowplow(tmp_path: Path) -> None:
    view = {
        "app_id": "shop",
        "platform": "web",
        "collector_tstamp": "2024-02-03T10:00:05.000Z",
        "dvce_created_tstamp": "2024-02-03T10:00:00.000Z",
        "derived_tstamp": "2024-02-03T10:00:04.500Z",
        "event": "page_view",
        "event_name": "page_view",
        "event_id": "c6ef3124-b53a-4b13-a233-0088f79dcbcb",
        "user_id": None,
        "domain_userid": "bc2e92ec6c204a14",
        "domain_sessionid": "s-1",
        "user_ipaddress": "198.51.100.4",
        "geo_country": "JP",
        "geo_city": "Osaka",
        "page_url": "https://shop.example/",
        "page_title": "Shop",
        "br_lang": "ja",
        "v_tracker": "js-3.1.0",
        "useragent": "Mozilla/5.0",
        "mkt_source": "mail",
        "contexts_org_w3_performance_timing_1": [{"x": 1}],
    }
    click = {
        **view,
        "event": "unstruct",
        "event_name": "link_click",
        "event_id": "c6ef3124-b53a-4b13-a233-0088f79dcbcc",
        "derived_tstamp": "2024-02-03T10:01:04.500Z",
        "user_id": "user-5",
        "mkt_source": None,
        "contexts_org_w3_performance_timing_1": None,
        "unstruct_event_com_snowplowanalytics_snowplow_link_click_1": {"targetUrl": "https://x"},
    }
    first, second = staged(tmp_path, "snowplow", [view, click])
    assert first == {
        **SKIP,
        "insert_id": "c6ef3124-b53a-4b13-a233-0088f79dcbcb",
        "event_type": "Page Viewed",
        "device_id": "bc2e92ec6c204a14",
        "time": 1706954404500,
        "session_id": 1706954404500,
        "platform": "Web",
        "user_agent": "Mozilla/5.0",
        "country": "Japan",
        "city": "Osaka",
        "ip": "198.51.100.4",
        "language": "ja",
        "library": "js-3.1.0",
        "user_properties": {"utm_source": "mail"},
        "event_properties": {
            "app_id": "shop",
            "page_url": "https://shop.example/",
            "page_title": "Shop",
            "contexts_org_w3_performance_timing_1": [{"x": 1}],
        },
    }
    assert second["event_type"] == "link_click"
    assert second["user_id"] == "user-5"
    assert second["session_id"] == 1706954404500  # the first moment of the domain session
    assert second["event_properties"]["unstruct_event_com_snowplowanalytics_snowplow_link_click_1"]


def test_snowplow_keeps_what_was_bought(tmp_path: Path) -> None:
    base = {"collector_tstamp": "2024-02-03T10:00:05Z", "domain_userid": "bc2e92ec6c204a14"}
    order = {"event_name": "transaction", "event_id": "e-1", "tr_orderid": "o-7", "tr_total": 30.5}
    order |= {"tr_currency": "EUR", "ti_sku": None, **base}
    item = {"event_name": "transaction_item", "event_id": "e-2", "ti_orderid": "o-7", "ti_sku": "A"}
    item |= {"ti_price": 10.25, "ti_quantity": 2, "ti_currency": "EUR", **base}
    first, second = staged(tmp_path, "snowplow", [order, item])
    assert (first["revenue"], first["currency"]) == (30.5, "EUR")
    assert first["event_properties"] == {"tr_orderid": "o-7"}
    assert (second["price"], second["quantity"], second["currency"]) == (10.25, 2, "EUR")
    assert second["event_properties"] == {"ti_orderid": "o-7", "ti_sku": "A"}


def test_snowplow_from_a_phone(tmp_path: Path) -> None:
    session = {"userId": "b2c8d1a0-0000-4000-8000-00000000000a", "sessionId": "s-9"}
    session["firstEventTimestamp"] = "2024-02-03T09:59:59.000Z"
    phone = {"osType": "android", "osVersion": "14", "deviceManufacturer": "Google"}
    prefix = "contexts_com_snowplowanalytics_snowplow_"
    opened = {
        "app_id": "shop-app",
        "platform": "mob",
        "dvce_created_tstamp": "2024-02-03T10:00:00.000Z",
        "event_name": "application_foreground",
        "event_id": "c6ef3124-b53a-4b13-a233-0088f79dcbcd",
        "network_userid": "not-this-one",
        f"{prefix}client_session_1": [session],
        f"{prefix}mobile_context_1": [{**phone, "deviceModel": "Pixel 8", "carrier": "Vodafone"}],
    }
    (event,) = staged(tmp_path, "snowplow", [opened])
    event.pop("event_properties")
    assert event == {
        **SKIP,
        "insert_id": "c6ef3124-b53a-4b13-a233-0088f79dcbcd",
        "event_type": "application_foreground",
        "device_id": "b2c8d1a0-0000-4000-8000-00000000000a",
        "time": 1706954400000,
        "session_id": 1706954399000,
        "platform": "Mobile",
        "os_name": "android",
        "os_version": "14",
        "device_manufacturer": "Google",
        "device_model": "Pixel 8",
        "carrier": "Vodafone",
    }


def test_signups_from_csv(tmp_path: Path) -> None:
    source = tmp_path / "users.csv"
    source.write_text(
        "id,created_at,plan,seats\n10001,2013-08-01 12:00:00,pro,3\n10002,2022-08-01,,\n"
    )
    run(tmp_path / "work", source, "signups", skip_user_properties_sync=False)
    assert events(tmp_path / "work") == [
        {
            **SKIP,
            "insert_id": "signup:10001",
            "event_type": "Sign Up",
            "user_id": "10001",
            "time": 1375358400000,
            "user_properties": {"plan": "pro", "seats": 3},
        },
        {
            **SKIP,
            "insert_id": "signup:10002",
            "event_type": "Sign Up",
            "user_id": "10002",
            "time": 1659312000000,
        },
    ]


@pytest.mark.parametrize("preset", mapping_file.presets())
def test_each_preset_can_be_read_as_a_file(preset: str) -> None:
    assert mapping_file.load(preset).fields
