"""Files that are no video, or no longer one, or were made to harm: {file name: Hostile}, each built in code.

Every one must be rejected for one of the reasons listed with it. Some name the canary, a file that nobody may open.
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
from tests.data.boxes import box, boxes, element, find, inserted, overwritten, replaced, starts_fast, without

STBL = "moov/trak/mdia/minf/stbl"
DREF = "moov/trak/mdia/minf/dinf/dref"
AVC1 = f"{STBL}/stsd/avc1"


class Hostile(NamedTuple):
    video: bytes
    reasons: set[str]


def hostile_files(canary: Path) -> dict[str, Hostile]:
    return (
        _cut_off()
        | _other_kinds()
        | _references(canary)
        | _lists_in_mp4()
        | _boxes_in_mp4()
        | _streams()
        | _payloads()
        | _bombs()
        | _other_containers()
    )


@functools.cache
def noise_frames() -> np.ndarray:
    """uint8 [90, 64, 64, 3] that cannot be compressed, so that cutting a file anywhere cuts frames."""
    return np.random.default_rng(0).integers(0, 255, (90, 64, 64, 3), dtype=np.uint8)


@functools.cache
def good_file(kind: str, codec: str) -> bytes:
    """Three seconds of noise."""
    return encode(
        noise_frames(), 30, kind, codec, **({"cpu-used": "8", "deadline": "realtime"} if "vp9" in codec else {})
    )


def mp4() -> bytes:
    return good_file("mp4", "libx264")


def mkv() -> bytes:
    return good_file("matroska", "libx264")


def avi() -> bytes:
    return good_file("avi", "mpeg4")


def webm() -> bytes:
    return good_file("webm", "libvpx-vp9")


def _cut_off() -> dict[str, Hostile]:
    shares = (0.001, 0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.85, 0.95, 0.99)
    files = {}
    for name, video in (("plain", mp4()), ("faststart", starts_fast(mp4()))):
        for share in shares:
            files[f"{name}-{share:.3f}.mp4"] = Hostile(
                video[: int(len(video) * share)], {"not_video", "no_video", "damaged"}
            )
    # These list no frames that would then be missed.
    for name, video in (("cut.mkv", mkv()), ("cut.webm", webm()), ("cut.avi", avi())):
        files |= {
            f"{share}-{name}": Hostile(video[: int(len(video) * share)], {"damaged"}) for share in (0.1, 0.4, 0.8)
        }
    between = avi().index(b"00dc", len(avi()) // 2)
    files["between-frames.avi"] = Hostile(avi()[:between], {"damaged"})
    indexed = fragmented(flags=INDEXED)
    for fragments in (1, 2):
        files[f"after-{fragments}-fragments.mp4"] = Hostile(first_fragments(indexed, fragments), {"damaged"})
    files["in-a-fragment.mp4"] = Hostile(first_fragments(fragmented(), 1, partly=400), {"damaged"})
    return files


def _other_kinds() -> dict[str, Hostile]:
    picture = Image.fromarray(noise_frames()[0])
    pictures = {}
    for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        out = io.BytesIO()
        moves = {"save_all": True, "append_images": [picture.rotate(90)]} if kind in ("gif", "webp") else {}
        picture.save(out, kind, **moves)
        pictures[f"picture.{kind}"] = out.getvalue()
    sound, archive = io.BytesIO(), io.BytesIO()
    with wave.open(sound, "wb") as wav:
        wav.setparams((1, 2, 16000, 0, "NONE", ""))
        wav.writeframes(bytes(32000))
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("video.mp4", mp4())
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>'
    files = pictures | {
        "picture.svg": svg,
        "note.mp4": b"this is no video at all\n" * 100,
        "page.mp4": b"<!DOCTYPE html><html><title>404 Not Found</title></html>",
        "data.json": b'{"error": "not found"}',
        "videos.zip": archive.getvalue(),
        "video.mp4.gz": zlib.compress(mp4(), wbits=31),
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
    return {"nothing.mp4": Hostile(b"", {"empty"}), "byte.mp4": Hostile(b"\0", {"not_video"})} | {
        name: Hostile(video, {"not_video"}) for name, video in files.items()
    }


def _references(canary: Path) -> dict[str, Hostile]:
    """Files that ask for another file to be opened, or for an address on this machine."""
    files, address = {}, "http://127.0.0.1:9/video.mp4"
    for name, target in (("file", f"file://{canary}"), ("path", str(canary)), ("http", address)):
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
        files |= {f"{name}.{kind}": Hostile(text.encode(), {"not_video"}) for kind, text in texts.items()}
        # A script that a careless look takes for an mp4, because of what it is called.
        files[f"script-{name}.mp4"] = Hostile(texts["ffconcat"].encode(), {"not_video"})
        # The frames are said to lie in another file: an address, and the alias that FFmpeg knows how to follow.
        hollow = _hollow(mp4())
        for kind, entry in (("url ", bytes(4) + target.encode() + b"\0"), ("alis", _alias(target))):
            files[f"elsewhere-{name}-{kind.strip()}.mov"] = Hostile(
                replaced(hollow, DREF, box("dref", bytes(4), struct.pack(">I", 1), box(kind, entry))),
                {"damaged", "not_video"},
            )
        reference = box("rdrf", bytes(4), b"url ", struct.pack(">I", len(target) + 1), target.encode() + b"\0")
        files[f"movie-{name}.mov"] = Hostile(
            box("ftyp", b"qt  ", bytes(4)) + box("moov", box("rmra", box("rmda", reference))), {"not_video", "no_video"}
        )
    return files


def _hollow(video: bytes) -> bytes:
    mdat = find(video, "mdat")[-1]
    return video[: mdat.body] + bytes(mdat.end - mdat.body) + video[mdat.end :]


def _alias(target: str) -> bytes:
    """A Macintosh alias record: volume, name, then the absolute path as item 2."""
    path = target.encode() + b"\0" * (len(target) % 2)
    head = bytes(4) + bytes(6) + b"\4disk".ljust(28, b"\0") + bytes(12) + b"\5video".ljust(64, b"\0") + bytes(16)
    head += struct.pack(">HH", 1, 1) + bytes(16)
    return head + struct.pack(">HH", 2, len(target)) + path + struct.pack(">HH", 0xFFFF, 0) + bytes(80)


def _lists_in_mp4() -> dict[str, Hostile]:
    """An mp4 whose lists of frames and durations say what cannot be."""
    most, any_of = b"\xff\xff\xff\xff", {"damaged", "too_long", "not_video", "still"}
    video, one_frame = mp4(), grey_video(1, 30)
    no_frames = video
    for kind in ("stts", "ctts", "stsz", "stsc", "stco", "stss"):
        no_frames = replaced(no_frames, f"{STBL}/{kind}", box(kind, bytes(12 if kind == "stsz" else 8)))
    return {
        "one-frame.mp4": Hostile(one_frame, {"still"}),
        "no-frames.mp4": Hostile(no_frames, {"no_frames"}),
        "frame-sizes-beyond.mp4": Hostile(overwritten(video, f"{STBL}/stsz", 8, most), any_of),
        "frame-size-fixed.mp4": Hostile(overwritten(video, f"{STBL}/stsz", 4, b"\x7f\xff\xff\xff"), any_of),
        "frames-without-end.mp4": Hostile(
            overwritten(overwritten(video, f"{STBL}/stsz", 4, b"\0\0\0\1\x7f\xff\xff\xff"), f"{STBL}/stts", 8, most),
            any_of,
        ),
        "frame-times-beyond.mp4": Hostile(overwritten(video, f"{STBL}/stts", 12, b"\x7f\xff\xff\xff"), any_of),
        "chunks-beyond-the-end.mp4": Hostile(overwritten(video, f"{STBL}/stco", 8, most), any_of),
        "chunks-without-frames.mp4": Hostile(overwritten(video, f"{STBL}/stsc", 12, bytes(4)), any_of),
        "key-frames-only-beyond.mp4": Hostile(_hollow(overwritten(video, f"{STBL}/stss", 8, most)), any_of),
        "lasts-for-days.mp4": Hostile(_lasting_days(video), {"too_long"}),
    }


def _lasting_days(video: bytes) -> bytes:
    """Every frame stays for half an hour, and all the headers agree."""
    video = without(video, "moov/trak/edts")  # which would cut the frames off again
    for path, offset in (("moov/mvhd", 16), ("moov/trak/tkhd", 20), ("moov/trak/mdia/mdhd", 16)):
        video = overwritten(video, path, offset, b"\x7f\xff\xff\xff")
    return overwritten(video, f"{STBL}/stts", 12, struct.pack(">I", 30_000_000))


def _boxes_in_mp4() -> dict[str, Hostile]:
    """An mp4 whose boxes do not hold together."""
    video, not_video = mp4(), {"not_video"}
    top = {one.kind: video[one.start : one.end] for one in boxes(video)}
    nested = b""
    for _ in range(1000):
        nested = box("moov", nested)
    ours, media = find(video, "moov")[-1], find(video, "mdat")[-1]
    random = np.random.default_rng(2).bytes(50_000)
    return {
        "ftyp-only.mp4": Hostile(top["ftyp"], not_video | {"no_video"}),
        "ftyp-then-random.mp4": Hostile(top["ftyp"] + random, not_video | {"no_video"}),
        "moov-without-mdat.mp4": Hostile(top["ftyp"] + top["moov"], {"damaged"}),
        "mdat-without-moov.mp4": Hostile(top["ftyp"] + top["mdat"], not_video | {"no_video"}),
        "box-beyond-the-end.mp4": Hostile(
            video[: media.start] + b"\xff\xff\xff\xff" + video[media.start + 4 :], not_video
        ),
        "box-of-64-bits.mp4": Hostile(
            top["ftyp"] + struct.pack(">I4sQ", 1, b"moov", 2**64 - 1) + top["moov"][8:],
            {"damaged", "not_video", "no_video"},
        ),
        "box-smaller-than-itself.mp4": Hostile(
            video[: ours.start] + b"\0\0\0\4" + video[ours.start + 4 :], not_video | {"no_video"}
        ),
        "boxes-in-boxes.mp4": Hostile(top["ftyp"] + nested, not_video | {"no_video"}),
        "no-track.mp4": Hostile(without(video, "moov/trak"), {"no_video"}),
        "no-media.mp4": Hostile(without(video, "moov/trak/mdia"), {"no_video", "not_video", "no_frames"}),
        "no-sample-table.mp4": Hostile(without(video, STBL), {"no_decoder", "no_video"}),
        "no-sample-descriptions.mp4": Hostile(without(video, f"{STBL}/stsd"), {"no_decoder", "not_video", "no_frames"}),
        "no-decoder-settings.mp4": Hostile(without(video, f"{AVC1}/avcC"), {"damaged", "no_frames", "not_video"}),
        "compressed-moov.mov": Hostile(
            top["ftyp"] + box("moov", box("cmov", box("dcom", b"zlib"), box("cmvd", b"\xff" * 4, random))),
            {"memory"},
        ),
        "many-tracks.mp4": Hostile(
            inserted(_hollow(video), "moov/trak", b"".join([video[slice(*find(video, "moov/trak")[-1][1::2])]] * 500)),
            {"damaged", "not_video"},
        ),
    }


def _streams() -> dict[str, Hostile]:
    """Whole files without a video that could be decoded."""
    video = mp4()
    track = find(video, "moov/trak/tkhd")[-1]
    flat = overwritten(video, AVC1, 24, bytes(4))
    return {
        "sound-only.mp4": Hostile(_sound_only(), {"no_video"}),
        "cover-only.mp4": Hostile(_cover_only(), {"no_video"}),
        "subtitles-only.mkv": Hostile(_subtitles_only(), {"no_video"}),
        "unknown-codec.mp4": Hostile(_renamed(video, b"zzzz"), {"no_decoder"}),
        "encrypted.mp4": Hostile(_renamed(_hollow(video), b"encv"), {"no_decoder", "damaged"}),
        "no-time-scale.mp4": Hostile(
            overwritten(_hollow(video), "moov/trak/mdia/mdhd", 12, bytes(4)), {"damaged", "too_long", "still"}
        ),
        "no-size.mp4": Hostile(
            replaced(overwritten(flat, "moov/trak/tkhd", track.end - track.body - 8, bytes(8)), f"{AVC1}/avcC", b""),
            {"damaged", "no_frames", "not_video"},
        ),
    }


def _renamed(video: bytes, codec: bytes) -> bytes:
    place = find(video, AVC1)[-1].start
    return video[: place + 4] + codec + video[place + 8 :]


def _sound_only() -> bytes:
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
    """Music with a picture on its cover, which FFmpeg shows as a video of one frame."""
    sound, cover = _sound_only(), io.BytesIO()
    Image.fromarray(noise_frames()[0]).save(cover, "jpeg")
    item = box("covr", box("data", struct.pack(">II", 13, 0), cover.getvalue()))
    handler = box("hdlr", bytes(8), b"mdirappl", bytes(9))
    return inserted(sound, "moov/trak", box("udta", box("meta", bytes(4), handler, box("ilst", item))))


def _subtitles_only() -> bytes:
    track = element(
        "ae", element("d7", b"\1"), element("73c5", b"\1"), element("83", b"\x11"), element("86", b"S_TEXT/UTF8")
    )
    words = element("a0", element("a1", b"\x81\0\0\0words"), element("9b", b"\x03\xe8"))
    return _ebml() + element("18538067", element("1654ae6b", track), element("1f43b675", element("e7", b"\0"), words))


def _ebml(kind: bytes = b"matroska") -> bytes:
    return element("1a45dfa3", element("4282", kind))


def _payloads() -> dict[str, Hostile]:
    """Whole boxes around frames that are not."""
    video = mp4()
    mdat = find(video, "mdat")[-1]
    random = np.random.default_rng(3)
    files = {}
    for flips in (200, 2000):
        broken = np.frombuffer(video, np.uint8).copy()
        places = random.integers(mdat.body + 1000, mdat.end, flips)
        broken[places] ^= random.integers(1, 256, flips).astype(np.uint8)
        files[f"{flips}-bytes-flipped.mp4"] = Hostile(broken.tobytes(), {"damaged"})
    noise = random.bytes(mdat.end - mdat.body)
    files["random-frames.mp4"] = Hostile(video[: mdat.body] + noise + video[mdat.end :], {"damaged"})
    files["zero-frames.mp4"] = Hostile(_hollow(video), {"damaged"})
    middle = (mdat.body + mdat.end) // 2
    gap = bytes(20_000)
    files["hole.mp4"] = Hostile(video[:middle] + gap + video[middle + len(gap) :], {"damaged"})
    other = good_file("mp4", "mpeg4")
    files["other-codec.mp4"] = Hostile(
        replaced(video, f"{STBL}/stsd", other[slice(*find(other, f"{STBL}/stsd")[-1][1::2])]), {"damaged", "no_frames"}
    )
    return files


def _bombs() -> dict[str, Hostile]:
    """Small files with frames of 8192x8192."""
    small, large = key_frame(64, 64), key_frame(8192, 8192)
    sizes = {"too_large"}
    return {
        "bomb.mp4": Hostile(of_packets([large] * 3, "mp4", 8192, 8192), sizes),
        "bomb-that-says-64x64.mp4": Hostile(of_packets([large] * 3, "mp4", 64, 64), sizes),
        "bomb-that-says-64x64.mkv": Hostile(of_packets([large] * 3, "matroska", 64, 64), sizes),
        "bomb-that-says-64x64.avi": Hostile(of_packets([large] * 3, "avi", 64, 64), sizes),
        # The file is what it says, until it is not.
        "bomb-in-the-middle.mp4": Hostile(
            of_packets([small] * 20 + [large] * 3, "mp4", 64, 64), {"damaged", "too_large"}
        ),
    }


@functools.cache
def key_frame(width: int, height: int, level: int = 128) -> bytes:
    """One H.264 frame of a single grey that needs no other, with its settings before it."""
    context = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.time_base, context.framerate, context.thread_count = Fraction(1, 10), Fraction(10), 1
    context.options = {"preset": "ultrafast", "tune": "zerolatency"}
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane, value in zip(frame.planes, (level, 128, 128), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def of_packets(
    packets: list[bytes], kind: str, width: int, height: int, codec: str = "libx264", fps: int = 10
) -> bytes:
    """A file of ready packets."""
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


def _other_containers() -> dict[str, Hostile]:
    not_video, random = {"not_video"}, np.random.default_rng(4).bytes(20_000)
    video, cluster = mkv(), mkv().index(bytes.fromhex("1f43b675"))
    movi = avi().index(b"movi")
    return {
        "ebml-only.webm": Hostile(_ebml(b"webm"), not_video | {"no_video"}),
        "ebml-of-something-else.mkv": Hostile(_ebml(b"spreadsheet") + random, not_video | {"no_video"}),
        "ebml-then-random.mkv": Hostile(_ebml() + random, not_video | {"no_video"}),
        "element-beyond-the-end.mkv": Hostile(video[:4] + b"\x01" + b"\xff" * 6 + b"\xfe" + video[5:], not_video),
        "element-without-size.mkv": Hostile(
            _ebml() + bytes.fromhex("18538067") + b"\0" * 1000, not_video | {"no_video"}
        ),
        "no-cluster.mkv": Hostile(video[:cluster], {"no_frames", "damaged", "not_video"}),
        "random-cluster.mkv": Hostile(video[:cluster] + random, {"no_frames", "damaged", "not_video"}),
        "header-only.avi": Hostile(avi()[:movi], {"no_frames", "not_video", "damaged"}),
        "random-frames.avi": Hostile(avi()[: movi + 4] + random, {"no_frames", "damaged", "still"}),
        "riff-only.avi": Hostile(b"RIFF\xff\xff\xff\xffAVI ", not_video | {"no_video"}),
        "riff-then-random.avi": Hostile(b"RIFF\xff\xff\xff\xffAVI LIST" + random, not_video | {"no_video"}),
    }


LIVE, INDEXED = "frag_keyframe+empty_moov+default_base_moof", "frag_keyframe+dash+global_sidx"


@functools.cache
def fragmented(frames: int = 50, fps: int = 10, sound_s: float = 0, flags: str = LIVE) -> bytes:
    """An mp4 of a fragment a second."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        _write_fragmented(file.name, frames, fps, sound_s, flags)
        return Path(file.name).read_bytes()


def _write_fragmented(path: str, frames: int, fps: int, sound_s: float, flags: str) -> None:
    with av.open(path, "w", format="mp4", options={"movflags": flags}) as container:
        video = container.add_stream("libx264", rate=fps, options={"x264-params": f"keyint={fps}:scenecut=0"})
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sound = container.add_stream("aac", rate=16000, layout="mono") if sound_s else None
        for level in grey_levels(frames):
            picture = np.full((64, 64, 3), level, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if sound is not None:
            noise = av.AudioFrame.from_ndarray(
                np.zeros((1, int(16000 * sound_s)), np.float32), format="fltp", layout="mono"
            )
            noise.sample_rate = 16000
            container.mux([*sound.encode(noise), *sound.encode()])


def states_length(video: bytes, seconds: float, where: str) -> bytes:
    """The file with a length of the whole presentation in its header, which the muxer leaves open."""
    if where == "mehd":
        return inserted(video, "moov/mvex/trex", box("mehd", struct.pack(">II", 0, round(1000 * seconds))))
    return overwritten(video, "moov/mvhd", 16, struct.pack(">I", round(1000 * seconds)))


def first_fragments(video: bytes, number: int, partly: int = 0) -> bytes:
    """The file cut off after so many fragments, and so many bytes of the next."""
    starts = [part.start for part in boxes(video) if part.kind == "moof"]
    return video[: starts[number] + partly]
