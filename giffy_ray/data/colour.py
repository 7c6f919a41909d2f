"""Converts HDR and wide-gamut frames to BT.709 for SDR displays. Pure numpy; channels are RGB.

HDR (PQ and HLG, ITU-R BT.2100) is tone-mapped with the curve of FFmpeg's `tonemap=mobius`; diffuse white is 203 cd/m2
(ITU-R BT.2408). Luminance below 0.3 of diffuse white is unchanged, highlights are compressed, and diffuse white maps to
216 of 255. The result matches this FFmpeg filter graph, with `peak` as below:

    zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0:peak=...,zscale=t=bt709:m=bt709

Wide-gamut SDR (BT.2020, Display P3) keeps its brightness; colours outside BT.709 are clipped.
"""

from __future__ import annotations

import functools

import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc

_MAX_CODE = 255 * 2**8  # FFmpeg's 16-bit RGB code of the highest signal
_WHITE_NITS = 203.0
_KNEE = 0.3  # in units of diffuse white; FFmpeg's default
_PEAK_NITS = {ColorTrc.SMPTE2084: 10_000.0, ColorTrc.ARIB_STD_B67: 1_000.0}  # luminance of the highest signal
_DISPLAY_GAMMA = 2.4  # ITU-R BT.1886
_HLG_GAMMA = 1.2  # system gamma of a display with the peak above
_D65_XY = 0.3127, 0.3290
# CIE xy coordinates of red, green and blue.
_PRIMARIES_XY = {
    ColorPrimaries.BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}
_WIDE_GAMUTS = (ColorPrimaries.BT2020, ColorPrimaries.SMPTE432)


def is_hdr(transfer: int) -> bool:
    return transfer in _PEAK_NITS


def is_wide_gamut(primaries: int) -> bool:
    return primaries in _WIDE_GAMUTS


def to_bt709(frame: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Converts a frame for a BT.709 display.

    Args:
        frame: uint16 [height, width, 3], RGB encoded with `transfer`.
        transfer: Transfer characteristic, an FFmpeg number (ColorTrc).
        primaries: Colour primaries, an FFmpeg number (ColorPrimaries). HDR with unknown primaries counts as BT.2020.

    Returns:
        uint8 [height, width, 3].
    """
    light = _linear_light_table(transfer if is_hdr(transfer) else 0)[frame]  # 1: diffuse white
    if transfer == ColorTrc.ARIB_STD_B67:
        luminance = light @ _rgb_to_xyz(ColorPrimaries.BT2020)[1].astype(np.float32)
        light *= np.maximum(luminance, 1e-9)[..., None] ** (_HLG_GAMMA - 1)
        light *= _PEAK_NITS[ColorTrc.ARIB_STD_B67] / _WHITE_NITS
    if primaries in _PRIMARIES_XY or is_hdr(transfer):
        light = light @ _to_bt709_matrix(primaries if primaries in _PRIMARIES_XY else ColorPrimaries.BT2020).T
    if is_hdr(transfer):
        light = _tone_map(light, _PEAK_NITS[ColorTrc(transfer)] / _WHITE_NITS)
    return (255 * np.clip(light, 0, 1) ** (1 / _DISPLAY_GAMMA) + 0.5).astype(np.uint8)


@functools.cache
def _linear_light_table(transfer: int) -> np.ndarray:
    """float32 [65536]: linear light of each code, 1 at diffuse white; for HLG scene light, 1 at its peak."""
    signal = np.minimum(np.arange(2**16) / _MAX_CODE, 1)
    match transfer:
        case ColorTrc.SMPTE2084:  # ITU-R BT.2100, table 4: EOTF
            root = signal ** (32 / 2523)
            light = np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)
            light = 10_000 / _WHITE_NITS * light ** (16384 / 2610)
        case ColorTrc.ARIB_STD_B67:  # ITU-R BT.2100, table 5: inverse OETF
            a, b, c = 0.17883277, 0.28466892, 0.55991073
            light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        case _:
            light = signal**_DISPLAY_GAMMA
    return light.astype(np.float32)


def _tone_map(light: np.ndarray, peak: float) -> np.ndarray:
    """Scales all channels of a pixel by the gain of its brightest channel, which preserves the hue."""
    brightest = np.maximum(light.max(axis=-1, keepdims=True), 1e-6)
    a = -(_KNEE**2) * (peak - 1) / (_KNEE**2 - 2 * _KNEE + peak)
    b = (_KNEE**2 - 2 * _KNEE * peak + peak) / (peak - 1)
    curve = (b**2 + 2 * b * _KNEE + _KNEE**2) / (b - a) * (brightest + a) / (brightest + b)
    return light * np.where(brightest <= _KNEE, 1, curve / brightest)


@functools.cache
def _to_bt709_matrix(primaries: int) -> np.ndarray:
    """float32 [3, 3]: converts linear RGB of these primaries to BT.709."""
    return (np.linalg.inv(_rgb_to_xyz(ColorPrimaries.BT709)) @ _rgb_to_xyz(primaries)).astype(np.float32)


@functools.cache
def _rgb_to_xyz(primaries: int) -> np.ndarray:
    """float64 [3, 3]: converts linear RGB to CIE XYZ, where RGB (1, 1, 1) is D65 white of luminance 1."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in _PRIMARIES_XY[ColorPrimaries(primaries)]]).T
    x, y = _D65_XY
    return columns * np.linalg.solve(columns, (x / y, 1, (1 - x - y) / y))
