"""Hostile files, built in code: files that are not videos, damaged videos, and malicious videos.

Each must be rejected for one of the reasons listed with it. Some refer to the canary, a file that no process may open.
"""

from __future__ import annotations

import functools
import io
import struct
import tempfile
import wave
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from tests.conftest import encode, grey_levels, grey_video
from tests.data.boxes import (
    find_box,
    insert_box,
    list_boxes,
    make_box,
    make_element,
    make_faststart,
    overwrite_body,
    remove_box,
    replace_box,
)

STBL = "moov/trak/mdia/minf/stbl"
DREF = "moov/trak/mdia/minf/dinf/dref"
AVC1 = f"{STBL}/stsd/avc1"


class HostileFile(NamedTuple):
    video: bytes
    reasons: set[str]


def hostile_files(canary: Path) -> dict[str, HostileFile]:
    """Returns all hostile files by file name."""
    return (
        _truncated_files()
        | _other_formats()
        | _external_references(canary)
        | _mp4_frame_lists()
        | _mp4_structures()
        | _streams()
        | _payloads()
        | _bombs()
        | _other_containers()
    )


@functools.cache
def noise_frames() -> np.ndarray:
    """uint8 [90, 64, 64, 3]: incompressible, so that truncating a file anywhere cuts frames."""
    return np.random.default_rng(0).integers(0, 255, (90, 64, 64, 3), dtype=np.uint8)


@functools.cache
def encode_noise(kind: str, codec: str) -> bytes:
    """Encodes three seconds of noise."""
    options = {"cpu-used": "8", "deadline": "realtime"} if "vp9" in codec else {}
    return encode(noise_frames(), 30, kind, codec, **options)


def noise_mp4() -> bytes:
    return encode_noise("mp4", "libx264")


def noise_mkv() -> bytes:
    return encode_noise("matroska", "libx264")


def noise_avi() -> bytes:
    return encode_noise("avi", "mpeg4")


def noise_webm() -> bytes:
    return encode_noise("webm", "libvpx-vp9")


def _truncated_files() -> dict[str, HostileFile]:
    fractions = (0.001, 0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.85, 0.95, 0.99)
    files = {}
    for name, video in (("plain", noise_mp4()), ("faststart", make_faststart(noise_mp4()))):
        for fraction in fractions:
            part = video[: int(len(video) * fraction)]
            files[f"{name}-{fraction:.3f}.mp4"] = HostileFile(part, {"not_video", "no_video", "damaged"})
    # These formats have no frame list that would show which frames are missing.
    for name, video in (("cut.mkv", noise_mkv()), ("cut.webm", noise_webm()), ("cut.avi", noise_avi())):
        for fraction in (0.1, 0.4, 0.8):
            files[f"{fraction}-{name}"] = HostileFile(video[: int(len(video) * fraction)], {"damaged"})
    between = noise_avi().index(b"00dc", len(noise_avi()) // 2)
    files["between-frames.avi"] = HostileFile(noise_avi()[:between], {"damaged"})
    indexed = encode_fragmented(flags=INDEXED)
    for count in (1, 2):
        files[f"after-{count}-fragments.mp4"] = HostileFile(keep_fragments(indexed, count), {"damaged"})
    files["in-a-fragment.mp4"] = HostileFile(keep_fragments(encode_fragmented(), 1, extra_bytes=400), {"damaged"})
    return files


def _other_formats() -> dict[str, HostileFile]:
    picture = Image.fromarray(noise_frames()[0])
    pictures = {}
    for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        out = io.BytesIO()
        options = {"save_all": True, "append_images": [picture.rotate(90)]} if kind in ("gif", "webp") else {}
        picture.save(out, kind, **options)
        pictures[f"picture.{kind}"] = out.getvalue()
    sound, archive = io.BytesIO(), io.BytesIO()
    with wave.open(sound, "wb") as wav:
        wav.setparams((1, 2, 16000, 0, "NONE", ""))
        wav.writeframes(bytes(32000))
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("video.mp4", noise_mp4())
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>'
    files = pictures | {
        "picture.svg": svg,
        "note.mp4": b"this is no video at all\n" * 100,
        "page.mp4": b"<!DOCTYPE html><html><title>404 Not Found</title></html>",
        "data.json": b'{"error": "not found"}',
        "videos.zip": archive.getvalue(),
        "video.mp4.gz": zlib.compress(noise_mp4(), wbits=31),
        "program.mp4": b"\x7fELF\x02\x01\x01" + bytes(5000),
        "sound.wav": sound.getvalue(),
        "sound.mp3": (b"\xff\xfb\x90\x00" + bytes(413)) * 50,
        "tagged.mp3": b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10) + (b"\xff\xfb\x90\x00" + bytes(413)) * 50,
        "broadcast.ts": encode(noise_frames()[:10], 10, "mpegts", "mpeg4"),
        "raw.h264": encode(noise_frames()[:10], 10, "h264"),
        "old.flv": encode(noise_frames()[:10], 10, "flv", "flv"),
        "picture-called.mp4": pictures["picture.png"],
        "zeros.mp4": bytes(5000),
        "random.mp4": np.random.default_rng(1).bytes(50_000),
    }
    return {"nothing.mp4": HostileFile(b"", {"empty"}), "byte.mp4": HostileFile(b"\0", {"not_video"})} | {
        name: HostileFile(video, {"not_video"}) for name, video in files.items()
    }


def _external_references(canary: Path) -> dict[str, HostileFile]:
    """Files that refer to another file or to a URL on this machine."""
    files: dict[str, HostileFile] = {}
    url = "http://127.0.0.1:9/video.mp4"
    for name, target in (("file", f"file://{canary}"), ("path", str(canary)), ("http", url)):
        texts = {
            "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{target}\n#EXT-X-ENDLIST\n",
            "ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
            "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns={target}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
            "mpd": (
                '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
                f'<AdaptationSet mimeType="video/mp4"><Representation id="1"><BaseURL>{target}</BaseURL>'
                "</Representation></AdaptationSet></Period></MPD>"
            ),
            "ism": f'<?xml version="1.0"?><SmoothStreamingMedia Url="{target}"/>',
            "asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
        }
        files |= {f"{name}.{kind}": HostileFile(text.encode(), {"not_video"}) for kind, text in texts.items()}
        # A script with the extension of a video.
        files[f"script-{name}.mp4"] = HostileFile(texts["ffconcat"].encode(), {"not_video"})
        # The header states that the frames are in another file: a URL, and the kind of alias that FFmpeg can follow.
        zeroed = _zero_frames(noise_mp4())
        for kind, entry in (("url ", bytes(4) + target.encode() + b"\0"), ("alis", _alias(target))):
            files[f"elsewhere-{name}-{kind.strip()}.mov"] = HostileFile(
                replace_box(zeroed, DREF, make_box("dref", bytes(4), struct.pack(">I", 1), make_box(kind, entry))),
                {"damaged", "not_video"},
            )
        reference = make_box("rdrf", bytes(4), b"url ", struct.pack(">I", len(target) + 1), target.encode() + b"\0")
        files[f"movie-{name}.mov"] = HostileFile(
            make_box("ftyp", b"qt  ", bytes(4)) + make_box("moov", make_box("rmra", make_box("rmda", reference))),
            {"not_video", "no_video"},
        )
    return files


def _zero_frames(video: bytes) -> bytes:
    """Overwrites the media data with zeros."""
    mdat = find_box(video, "mdat")[-1]
    return video[: mdat.body] + bytes(mdat.end - mdat.body) + video[mdat.end :]


def _alias(target: str) -> bytes:
    """Builds a Macintosh alias record: volume, name, then the absolute path as item 2."""
    path = target.encode() + b"\0" * (len(target) % 2)
    header = bytes(4) + bytes(6) + b"\4disk".ljust(28, b"\0") + bytes(12) + b"\5video".ljust(64, b"\0") + bytes(16)
    header += struct.pack(">HH", 1, 1) + bytes(16)
    return header + struct.pack(">HH", 2, len(target)) + path + struct.pack(">HH", 0xFFFF, 0) + bytes(80)


def _mp4_frame_lists() -> dict[str, HostileFile]:
    """Impossible frame lists and durations in an mp4."""
    all_ones, reasons = b"\xff\xff\xff\xff", {"damaged", "too_long", "not_video", "still"}
    video, one_frame = noise_mp4(), grey_video(1, 30)
    no_frames = video
    for kind in ("stts", "ctts", "stsz", "stsc", "stco", "stss"):
        no_frames = replace_box(no_frames, f"{STBL}/{kind}", make_box(kind, bytes(12 if kind == "stsz" else 8)))
    return {
        "one-frame.mp4": HostileFile(one_frame, {"still"}),
        "no-frames.mp4": HostileFile(no_frames, {"no_frames"}),
        "frame-sizes-beyond.mp4": HostileFile(overwrite_body(video, f"{STBL}/stsz", 8, all_ones), reasons),
        "frame-size-fixed.mp4": HostileFile(overwrite_body(video, f"{STBL}/stsz", 4, b"\x7f\xff\xff\xff"), reasons),
        "frames-without-end.mp4": HostileFile(
            overwrite_body(
                overwrite_body(video, f"{STBL}/stsz", 4, b"\0\0\0\1\x7f\xff\xff\xff"), f"{STBL}/stts", 8, all_ones
            ),
            reasons,
        ),
        "frame-times-beyond.mp4": HostileFile(overwrite_body(video, f"{STBL}/stts", 12, b"\x7f\xff\xff\xff"), reasons),
        "chunks-beyond-the-end.mp4": HostileFile(overwrite_body(video, f"{STBL}/stco", 8, all_ones), reasons),
        "chunks-without-frames.mp4": HostileFile(overwrite_body(video, f"{STBL}/stsc", 12, bytes(4)), reasons),
        "key-frames-only-beyond.mp4": HostileFile(
            _zero_frames(overwrite_body(video, f"{STBL}/stss", 8, all_ones)), reasons
        ),
        "lasts-for-days.mp4": HostileFile(_extend_to_days(video), {"too_long"}),
    }


def _extend_to_days(video: bytes) -> bytes:
    """Makes every frame last half an hour, consistently in all headers."""
    video = remove_box(video, "moov/trak/edts")  # the edit list would discard the frames
    for path, offset in (("moov/mvhd", 16), ("moov/trak/tkhd", 20), ("moov/trak/mdia/mdhd", 16)):
        video = overwrite_body(video, path, offset, b"\x7f\xff\xff\xff")
    return overwrite_body(video, f"{STBL}/stts", 12, struct.pack(">I", 30_000_000))


def _mp4_structures() -> dict[str, HostileFile]:
    """Inconsistent box structures in an mp4."""
    video, not_video = noise_mp4(), {"not_video"}
    top = {box.kind: video[box.start : box.end] for box in list_boxes(video)}
    nested = b""
    for _ in range(1000):
        nested = make_box("moov", nested)
    moov, mdat = find_box(video, "moov")[-1], find_box(video, "mdat")[-1]
    track = find_box(video, "moov/trak")[-1]
    tracks = video[track.start : track.end] * 500
    random_bytes = np.random.default_rng(2).bytes(50_000)
    compressed = make_box("cmov", make_box("dcom", b"zlib"), make_box("cmvd", b"\xff" * 4, random_bytes))
    return {
        "ftyp-only.mp4": HostileFile(top["ftyp"], not_video | {"no_video"}),
        "ftyp-then-random.mp4": HostileFile(top["ftyp"] + random_bytes, not_video | {"no_video"}),
        "moov-without-mdat.mp4": HostileFile(top["ftyp"] + top["moov"], {"damaged"}),
        "mdat-without-moov.mp4": HostileFile(top["ftyp"] + top["mdat"], not_video | {"no_video"}),
        "box-beyond-the-end.mp4": HostileFile(
            video[: mdat.start] + b"\xff\xff\xff\xff" + video[mdat.start + 4 :], not_video
        ),
        "box-of-64-bits.mp4": HostileFile(
            top["ftyp"] + struct.pack(">I4sQ", 1, b"moov", 2**64 - 1) + top["moov"][8:],
            {"damaged", "not_video", "no_video"},
        ),
        "box-smaller-than-itself.mp4": HostileFile(
            video[: moov.start] + b"\0\0\0\4" + video[moov.start + 4 :], not_video | {"no_video"}
        ),
        "boxes-in-boxes.mp4": HostileFile(top["ftyp"] + nested, not_video | {"no_video"}),
        "no-track.mp4": HostileFile(remove_box(video, "moov/trak"), {"no_video"}),
        "no-media.mp4": HostileFile(remove_box(video, "moov/trak/mdia"), {"no_video", "not_video", "no_frames"}),
        "no-sample-table.mp4": HostileFile(remove_box(video, STBL), {"no_decoder", "no_video"}),
        "no-sample-descriptions.mp4": HostileFile(
            remove_box(video, f"{STBL}/stsd"), {"no_decoder", "not_video", "no_frames"}
        ),
        "no-decoder-settings.mp4": HostileFile(
            remove_box(video, f"{AVC1}/avcC"), {"damaged", "no_frames", "not_video"}
        ),
        "compressed-moov.mov": HostileFile(top["ftyp"] + make_box("moov", compressed), {"memory"}),
        "many-tracks.mp4": HostileFile(insert_box(_zero_frames(video), "moov/trak", tracks), {"damaged", "not_video"}),
    }


def _streams() -> dict[str, HostileFile]:
    """Complete files without a decodable video."""
    video = noise_mp4()
    header = find_box(video, "moov/trak/tkhd")[-1]
    sizeless = overwrite_body(video, AVC1, 24, bytes(4))
    sizeless = overwrite_body(sizeless, "moov/trak/tkhd", header.end - header.body - 8, bytes(8))
    return {
        "sound-only.mp4": HostileFile(_audio_only(), {"no_video"}),
        "cover-only.mp4": HostileFile(_cover_only(), {"no_video"}),
        "subtitles-only.mkv": HostileFile(_subtitles_only(), {"no_video"}),
        "unknown-codec.mp4": HostileFile(_set_codec(video, b"zzzz"), {"no_decoder"}),
        "encrypted.mp4": HostileFile(_set_codec(_zero_frames(video), b"encv"), {"no_decoder", "damaged"}),
        "no-time-scale.mp4": HostileFile(
            overwrite_body(_zero_frames(video), "moov/trak/mdia/mdhd", 12, bytes(4)), {"damaged", "too_long", "still"}
        ),
        "no-size.mp4": HostileFile(remove_box(sizeless, f"{AVC1}/avcC"), {"damaged", "no_frames", "not_video"}),
    }


def _set_codec(video: bytes, codec: bytes) -> bytes:
    start = find_box(video, AVC1)[-1].start
    return video[: start + 4] + codec + video[start + 8 :]


def _audio_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def _cover_only() -> bytes:
    """Audio with cover art, which FFmpeg presents as a video of one frame."""
    sound, cover = _audio_only(), io.BytesIO()
    Image.fromarray(noise_frames()[0]).save(cover, "jpeg")
    item = make_box("covr", make_box("data", struct.pack(">II", 13, 0), cover.getvalue()))
    handler = make_box("hdlr", bytes(8), b"mdirappl", bytes(9))
    return insert_box(sound, "moov/trak", make_box("udta", make_box("meta", bytes(4), handler, make_box("ilst", item))))


def _subtitles_only() -> bytes:
    track = make_element(
        "ae",
        make_element("d7", b"\1"),
        make_element("73c5", b"\1"),
        make_element("83", b"\x11"),
        make_element("86", b"S_TEXT/UTF8"),
    )
    subtitle = make_element("a0", make_element("a1", b"\x81\0\0\0words"), make_element("9b", b"\x03\xe8"))
    return _ebml() + make_element(
        "18538067", make_element("1654ae6b", track), make_element("1f43b675", make_element("e7", b"\0"), subtitle)
    )


def _ebml(kind: bytes = b"matroska") -> bytes:
    return make_element("1a45dfa3", make_element("4282", kind))


def _payloads() -> dict[str, HostileFile]:
    """Intact boxes around damaged frames."""
    video = noise_mp4()
    mdat = find_box(video, "mdat")[-1]
    random = np.random.default_rng(3)
    files = {}
    for flips in (200, 2000):
        broken = np.frombuffer(video, np.uint8).copy()
        offsets = random.integers(mdat.body + 1000, mdat.end, flips)
        broken[offsets] ^= random.integers(1, 256, flips).astype(np.uint8)
        files[f"{flips}-bytes-flipped.mp4"] = HostileFile(broken.tobytes(), {"damaged"})
    noise = random.bytes(mdat.end - mdat.body)
    files["random-frames.mp4"] = HostileFile(video[: mdat.body] + noise + video[mdat.end :], {"damaged"})
    files["zero-frames.mp4"] = HostileFile(_zero_frames(video), {"damaged"})
    middle = (mdat.body + mdat.end) // 2
    gap = bytes(20_000)
    files["hole.mp4"] = HostileFile(video[:middle] + gap + video[middle + len(gap) :], {"damaged"})
    other = encode_noise("mp4", "mpeg4")
    other_description = find_box(other, f"{STBL}/stsd")[-1]
    files["other-codec.mp4"] = HostileFile(
        replace_box(video, f"{STBL}/stsd", other[other_description.start : other_description.end]),
        {"damaged", "no_frames"},
    )
    return files


def _bombs() -> dict[str, HostileFile]:
    """Small files with frames of 8192x8192."""
    small, large = encode_keyframe(64, 64), encode_keyframe(8192, 8192)
    reasons = {"too_large"}
    return {
        "bomb.mp4": HostileFile(mux_packets([large] * 3, "mp4", 8192, 8192), reasons),
        "bomb-that-says-64x64.mp4": HostileFile(mux_packets([large] * 3, "mp4", 64, 64), reasons),
        "bomb-that-says-64x64.mkv": HostileFile(mux_packets([large] * 3, "matroska", 64, 64), reasons),
        "bomb-that-says-64x64.avi": HostileFile(mux_packets([large] * 3, "avi", 64, 64), reasons),
        # The first frames match the stated size, the last ones do not.
        "bomb-in-the-middle.mp4": HostileFile(
            mux_packets([small] * 20 + [large] * 3, "mp4", 64, 64), {"damaged", "too_large"}
        ),
    }


@functools.cache
def encode_keyframe(width: int, height: int, level: int = 128) -> bytes:
    """Encodes one uniformly grey H.264 keyframe, preceded by its parameter sets."""
    context = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.time_base, context.framerate, context.thread_count = Fraction(1, 10), Fraction(10), 1
    context.options = {"preset": "ultrafast", "tune": "zerolatency"}
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane, value in zip(frame.planes, (level, 128, 128), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def mux_packets(
    packets: list[bytes], kind: str, width: int, height: int, codec: str = "libx264", fps: int = 10
) -> bytes:
    """Muxes encoded packets into a file."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, payload in enumerate(packets):
            packet = av.Packet(payload)
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = Fraction(1, fps), True
            container.mux(packet)
    return out.getvalue()


def _other_containers() -> dict[str, HostileFile]:
    not_video, random_bytes = {"not_video"}, np.random.default_rng(4).bytes(20_000)
    video, cluster = noise_mkv(), noise_mkv().index(bytes.fromhex("1f43b675"))
    movi = noise_avi().index(b"movi")
    return {
        "ebml-only.webm": HostileFile(_ebml(b"webm"), not_video | {"no_video"}),
        "ebml-of-something-else.mkv": HostileFile(_ebml(b"spreadsheet") + random_bytes, not_video | {"no_video"}),
        "ebml-then-random.mkv": HostileFile(_ebml() + random_bytes, not_video | {"no_video"}),
        "element-beyond-the-end.mkv": HostileFile(video[:4] + b"\x01" + b"\xff" * 6 + b"\xfe" + video[5:], not_video),
        "element-without-size.mkv": HostileFile(
            _ebml() + bytes.fromhex("18538067") + b"\0" * 1000, not_video | {"no_video"}
        ),
        "no-cluster.mkv": HostileFile(video[:cluster], {"no_frames", "damaged", "not_video"}),
        "random-cluster.mkv": HostileFile(video[:cluster] + random_bytes, {"no_frames", "damaged", "not_video"}),
        "header-only.avi": HostileFile(noise_avi()[:movi], {"no_frames", "not_video", "damaged"}),
        "random-frames.avi": HostileFile(noise_avi()[: movi + 4] + random_bytes, {"no_frames", "damaged", "still"}),
        "riff-only.avi": HostileFile(b"RIFF\xff\xff\xff\xffAVI ", not_video | {"no_video"}),
        "riff-then-random.avi": HostileFile(b"RIFF\xff\xff\xff\xffAVI LIST" + random_bytes, not_video | {"no_video"}),
    }


LIVE = "frag_keyframe+empty_moov+default_base_moof"
INDEXED = "frag_keyframe+dash+global_sidx"


@functools.cache
def encode_fragmented(frames: int = 50, fps: int = 10, sound_s: float = 0, flags: str = LIVE) -> bytes:
    """Encodes a fragmented mp4 with one fragment per second."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        _write_fragmented(file.name, frames, fps, sound_s, flags)
        return Path(file.name).read_bytes()


def _write_fragmented(path: str, frames: int, fps: int, sound_s: float, flags: str) -> None:
    with av.open(path, "w", format="mp4", options={"movflags": flags}) as container:
        video = container.add_stream("libx264", rate=fps, options={"x264-params": f"keyint={fps}:scenecut=0"})
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono") if sound_s else None
        for level in grey_levels(frames):
            pixels = np.full((64, 64, 3), level, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        if sound is not None:
            noise = av.AudioFrame.from_ndarray(
                np.zeros((1, int(16000 * sound_s)), np.float32), format="fltp", layout="mono"
            )
            noise.sample_rate = 16000
            container.mux([*sound.encode(noise), *sound.encode()])


def set_stated_duration(video: bytes, seconds: float, where: str) -> bytes:
    """Sets the duration of the whole presentation in the header, which the muxer leaves open."""
    if where == "mehd":
        return insert_box(video, "moov/mvex/trex", make_box("mehd", struct.pack(">II", 0, round(1000 * seconds))))
    return overwrite_body(video, "moov/mvhd", 16, struct.pack(">I", round(1000 * seconds)))


def keep_fragments(video: bytes, count: int, extra_bytes: int = 0) -> bytes:
    """Truncates the file after `count` fragments and `extra_bytes` of the next one."""
    starts = [box.start for box in list_boxes(video) if box.kind == "moof"]
    return video[: starts[count] + extra_bytes]
