"""Random identities and pose tracks of the procedural people.

Layer 1 (embedded recipe): numpy only apart from the textures that `scenery` paints. Lengths in centimetres, picture
positions in units of 1/128 of the picture height.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from posecrafter_rt.embedded.people_body import ArmPose, BodyPose, BodyShape
from posecrafter_rt.embedded.people_draw import Light
from posecrafter_rt.embedded.people_head import HeadMesh, HeadPose, HeadShape, curtain
from posecrafter_rt.embedded.scenery import make_background, make_cloth, make_suit, outdoors, random_colour, window_mask

MARGIN = 24  # pixels of background beyond each edge of a 128-high picture, room for panning

_SKINS = np.array(
    [
        [236, 196, 172],
        [226, 182, 154],
        [214, 166, 138],
        [198, 148, 118],
        [176, 124, 94],
        [146, 100, 74],
        [112, 76, 56],
        [82, 56, 42],
    ],
    float,
)
_HAIRS = {
    "black": (24, 20, 20),
    "dark brown": (48, 34, 26),
    "brown": (84, 58, 40),
    "light brown": (126, 92, 62),
    "blond": (186, 152, 102),
    "grey": (140, 138, 136),
    "red": (132, 66, 36),
    "white": (208, 206, 202),
}
_CLOTHES = {
    "white": (226, 224, 220),
    "grey": (128, 128, 130),
    "black": (32, 32, 36),
    "blue": (52, 78, 140),
    "light blue": (140, 170, 206),
    "navy": (32, 40, 72),
    "red": (160, 40, 42),
    "green": (56, 104, 66),
    "olive": (98, 98, 62),
    "yellow": (208, 176, 70),
    "orange": (200, 112, 48),
    "pink": (214, 150, 160),
    "purple": (104, 66, 126),
    "brown": (104, 76, 56),
    "beige": (200, 182, 150),
    "teal": (44, 116, 120),
}
_IRISES = np.array([[70, 46, 30], [52, 34, 24], [96, 70, 40], [92, 118, 140], [100, 120, 90], [120, 126, 130]], float)


@dataclass(eq=False)
class Person:
    """One identity in one place: face, body, clothes, background, light and camera. Make it with `Person.sample`."""

    head: HeadShape
    body: BodyShape
    light: Light
    mesh: HeadMesh
    coarse_mesh: HeadMesh
    long_hair: tuple[np.ndarray, np.ndarray] | None
    cloth: np.ndarray  # uint8 (192, 192, 3)
    background: np.ndarray  # uint8 (128 + 2 MARGIN, 160 + 2 MARGIN, 3)
    window: tuple[np.ndarray, np.ndarray] | None  # uint8 view, wider than the background; float mask of the background
    grain: np.ndarray  # float32 (192, 256, 3), camera noise in grey levels
    blur: float  # camera blur in pixels of a 128-high picture
    jpeg_quality: int | None
    gain: np.ndarray  # (3,) white balance and exposure
    words: dict[str, str] = field(default_factory=dict)

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Person:
        """Draw a random person, which the generator's state determines."""
        head, words, woman = _sample_head(rng)
        body = _sample_body(rng, words, woman)
        angle, height = rng.uniform(-1.3, 1.3), rng.uniform(-0.9, 0.15)
        direction = np.array([np.sin(angle), height, np.cos(angle) + 0.25])
        ambient = rng.uniform(0.28, 0.75)
        light = Light(
            direction / np.linalg.norm(direction),
            ambient,
            rng.uniform(0.95, 1.25) - ambient,
            1 + rng.uniform(-0.1, 0.1, 3),
        )
        window = None
        size = (128 + 2 * MARGIN, 160 + 2 * MARGIN)
        if rng.random() < 0.4:
            window = (outdoors(rng, size[0], 3 * size[1]).astype(np.uint8), window_mask(rng, *size))
        hair = None
        if head.hair_style in ("long", "medium"):
            length = rng.uniform(14, 34) if head.hair_style == "long" else rng.uniform(7, 13)
            hair = curtain(head, length, int(rng.integers(1 << 30)))
        grain = rng.standard_normal((192, 256, 3)).astype(np.float32)
        grain = (grain + 1.5 * rng.standard_normal((192, 256, 1)).astype(np.float32)) * np.float32(
            rng.uniform(0.2, 1.9)
        )
        return cls(
            head,
            body,
            light,
            HeadMesh(head),
            HeadMesh(head, 22, 13),
            hair,
            make_cloth(rng, body.shirt) if body.jacket is None else make_suit(rng, body.jacket, body.shirt),
            make_background(rng, *size),
            window,
            grain,
            rng.uniform(0.0, 0.75),
            int(rng.integers(45, 95)) if rng.random() < 0.35 else None,
            rng.uniform(0.8, 1.12) * (1 + rng.uniform(-0.05, 0.05, 3)),
            words,
        )


@dataclass
class Pose:
    """Where a person is in the picture and what each part does. Positions in 1/128 of the picture height."""

    scale: float  # picture units per centimetre
    neck: np.ndarray  # (2,) the point between the shoulders
    head_offset: np.ndarray  # (2,) centimetres that the head moves on its neck
    head: HeadPose
    body: BodyPose
    arms_in_front: bool
    pan: np.ndarray  # (2,) background shift
    window_pan: float
    exposure: float
    grain_seed: int


def _lip_colour(rng: np.random.Generator, skin: np.ndarray, painted: bool) -> np.ndarray:
    if not painted:
        return skin * np.array([0.86, 0.62, 0.62])
    return skin * 0.55 + 0.45 * np.array([rng.uniform(140, 200), rng.uniform(50, 100), rng.uniform(60, 105)])


def _sample_head(rng: np.random.Generator) -> tuple[HeadShape, dict[str, str], bool]:
    """Return the face, the words of the caption, and whether it is a woman's face."""
    woman = rng.random() < 0.45
    tone = rng.uniform(0, len(_SKINS) - 1) if rng.random() < 0.5 else rng.uniform(0, 3.5)
    skin = _SKINS[int(tone)] * (1 - tone % 1) + _SKINS[min(int(tone) + 1, len(_SKINS) - 1)] * (tone % 1)
    skin = skin * rng.uniform(0.94, 1.04, 3)
    hair_name = str(rng.choice(list(_HAIRS), p=[0.24, 0.22, 0.2, 0.1, 0.1, 0.06, 0.05, 0.03]))
    hair = np.array(_HAIRS[hair_name], float) * rng.uniform(0.85, 1.15) + 6
    style = str(
        rng.choice(["long", "medium", "short", "cap"], p=[0.5, 0.27, 0.17, 0.06])
        if woman
        else rng.choice(["short", "bald", "medium", "cap"], p=[0.74, 0.1, 0.06, 0.1])
    )
    lip = _lip_colour(rng, skin, woman)
    shape = HeadShape(
        width=rng.normal(1.0 if not woman else 0.96, 0.035),
        length=rng.normal(1.0 if not woman else 0.96, 0.03),
        jaw=rng.normal(1.02 if not woman else 0.92, 0.05),
        nose=np.clip(rng.normal(1.05 if not woman else 0.88, 0.14), 0.6, 1.5),
        eye_gap=rng.normal(1.0, 0.04),
        eye_size=np.clip(rng.normal(1.0 if not woman else 1.12, 0.12), 0.7, 1.4),
        brow_height=rng.normal(-0.05, 0.25),
        brow_thickness=rng.uniform(0.45, 1.0) if not woman else rng.uniform(0.25, 0.55),
        lip_thickness=rng.uniform(0.55, 1.1) if not woman else rng.uniform(0.8, 1.35),
        mouth_width=rng.normal(1.0, 0.07),
        skin=skin,
        hair=hair,
        lips=lip,
        iris=_IRISES[rng.integers(len(_IRISES))] * rng.uniform(0.8, 1.2),
        hair_style=style,
        hair_thickness=rng.uniform(0.5, 2.0),
        hairline=rng.uniform(-7.6, -5.4),
        parting=rng.uniform(-0.7, 0.7),
        beard=0.0 if woman or rng.random() < 0.5 else rng.uniform(0.12, 0.95),
        glasses="none" if rng.random() < 0.78 else str(rng.choice(["thin", "thick", "dark"], p=[0.4, 0.42, 0.18])),
        strands=rng.uniform(0.4, 1.4),
        cap=random_colour(rng, 25, 200),
        texture_seed=int(rng.integers(1 << 30)),
    )
    noun = "woman" if woman else "man"
    words = {
        "noun": noun if rng.random() < 0.5 else "person",
        "plain": "yes" if rng.random() < 0.5 else "",
        "hair": {"bald": "no hair", "cap": "a cap"}.get(style, f"{hair_name} hair"),
    }
    if shape.glasses != "none":
        words["glasses"] = "glasses"
    return shape, words, woman


def _sample_body(rng: np.random.Generator, words: dict[str, str], woman: bool) -> BodyShape:
    name = str(rng.choice(list(_CLOTHES)))
    colour = np.array(_CLOTHES[name], float) * rng.uniform(0.85, 1.12)
    suit = rng.random() < 0.3
    words["clothes"] = f"{name} {'suit' if suit else 'shirt'}"
    shirt = random_colour(rng, 170, 245, 0.1) if suit and rng.random() < 0.8 else colour
    trousers = np.array(_CLOTHES[str(rng.choice(["black", "navy", "grey", "beige", "blue", "brown"]))], float)
    return BodyShape(
        rng.normal(15.6 if woman else 17.6, 0.9),
        np.clip(rng.normal(0.92 if woman else 1.05, 0.09), 0.75, 1.4),
        "long" if suit else str(rng.choice(["long", "short"])),
        "tie" if suit else str(rng.choice(["crew", "vee", "shirt"], p=[0.5, 0.25, 0.25])),
        np.clip(shirt, 0, 245),
        trousers * rng.uniform(0.7, 1.2),
        random_colour(rng, 15, 120, 0.2),
        colour * rng.uniform(0.4, 1.0) if suit else None,
    )


def caption(person: Person) -> str:
    """Return a short English description; for half of the people it is just "a person"."""
    words = person.words
    if words.get("plain"):
        return "a person"
    glasses = " and glasses" if "glasses" in words else ""
    article = "an" if words["clothes"][0] in "aeiou" else "a"
    return f"a {words['noun']} with {words['hair']}{glasses} and {article} {words['clothes']}"


def _track(rng: np.random.Generator, n: int, sigma: float, centre: float = 0.0, loose: float = 0.4) -> np.ndarray:
    """Return n values around `centre`: a slow wave plus an independent part, with standard deviation about `sigma`."""
    t = np.linspace(0.0, 2 * np.pi, n, endpoint=False)
    wave = np.sin(t * rng.uniform(0.5, 1.5) + rng.uniform(0, 6.3)) + 0.6 * np.sin(
        t * rng.uniform(1.5, 4) + rng.uniform(0, 6.3)
    )
    return centre + sigma * ((1 - loose) * wave + loose * 1.3 * rng.standard_normal(n))


def _framing(rng: np.random.Generator, framing: str) -> tuple[float, np.ndarray]:
    """Return the scale (units per cm) and the position of the eyes."""
    if framing == "full":
        scale = rng.uniform(0.56, 0.71)
        return scale, np.array([rng.uniform(35, 125), 5 + 13 * scale + rng.uniform(0, 115 - 165 * scale + 6)])
    if framing == "half":
        return rng.uniform(1.1, 1.9), np.array([rng.normal(80, 20), rng.uniform(26, 44)])
    scale = float(np.exp(rng.uniform(np.log(1.7), np.log(4.2))))
    return scale, np.array([np.clip(rng.normal(80, 19), 30, 130), rng.uniform(30, 46) + 5 * scale])


def sample_poses(rng: np.random.Generator, person: Person, n: int, *, framing: str | None = None) -> list[Pose]:
    """Draw n loosely related poses of one person in one framing.

    Args:
        framing: "portrait", "half", "full", or None to draw one (65, 20, 15 %).
    """
    if framing is None:
        framing = str(rng.choice(["portrait", "half", "full"], p=[0.65, 0.20, 0.15]))
    scale, eyes = _framing(rng, framing)
    lively = rng.uniform(0.25, 1.15)
    head = _head_tracks(rng, n, lively)
    shift = 5.0 if framing == "portrait" else 6.0
    x = eyes[0] + _track(rng, n, shift * lively * (scale / 2.5) ** 0.5)
    y = eyes[1] + 22 * scale * person.head.length + _track(rng, n, 0.45 * shift * lively * (scale / 2.5) ** 0.5)
    size = scale * np.exp(_track(rng, n, 0.045 * lively))
    bodies = _body_tracks(rng, n, lively, framing)
    moving = rng.random() < 0.45
    pan = np.stack([_track(rng, n, 4.0 * moving, loose=0.5), _track(rng, n, 2.0 * moving, loose=0.5)], 1)
    window_pan = np.cumsum(rng.uniform(0, 1, n)) * rng.choice([0.0, 8.0, 25.0]) + rng.uniform(0, 200)
    exposure = 1 + _track(rng, n, rng.uniform(0, 0.04))
    offset = np.stack([_track(rng, n, 1.4 * lively), _track(rng, n, 0.7 * lively)], 1)
    in_front = bool(rng.random() < 0.75)
    return [
        Pose(
            float(size[i]),
            np.array([x[i], y[i]]),
            offset[i],
            head[i],
            bodies[i],
            in_front,
            np.clip(pan[i], -20, 20),
            float(window_pan[i]),
            float(exposure[i]),
            int(rng.integers(1 << 30)),
        )
        for i in range(n)
    ]


def _head_tracks(rng: np.random.Generator, n: int, lively: float) -> list[HeadPose]:
    yaw = np.clip(_track(rng, n, 0.34 * lively, rng.normal(0, 0.22)), -1.0, 1.0)
    pitch = np.clip(_track(rng, n, 0.15 * lively, rng.normal(0, 0.1)), -0.45, 0.45)
    roll = np.clip(_track(rng, n, 0.15 * lively, rng.normal(0, 0.07)), -0.6, 0.6)
    talking = rng.random() < 0.75
    mouth = np.clip(_track(rng, n, 0.32 if talking else 0.04, 0.25 if talking else 0.0, 0.8), 0.0, 1.1)
    smile = np.clip(_track(rng, n, 0.3, rng.normal(0.15, 0.3), 0.5), -0.5, 1.1)
    blink = np.where(rng.random(n) < 0.14, rng.uniform(0.4, 1.0, n), np.clip(_track(rng, n, 0.1, 0.08), -0.15, 0.4))
    gaze = _track(rng, n, 0.55, 0.0, 0.7), _track(rng, n, 0.3, 0.0, 0.7)
    brows = np.clip(_track(rng, n, 0.4, 0.1, 0.6), -0.7, 1.3)
    return [
        HeadPose(
            float(yaw[i]),
            float(pitch[i]),
            float(roll[i]),
            float(mouth[i]),
            float(smile[i]),
            float(blink[i]),
            float(np.clip(gaze[0][i], -1.2, 1.2)),
            float(np.clip(gaze[1][i], -1, 1)),
            float(brows[i]),
        )
        for i in range(n)
    ]


def _arm_tracks(rng: np.random.Generator, n: int, lively: float, framing: str) -> list[ArmPose]:
    raised = rng.random() < {"portrait": 0.12, "half": 0.6, "full": 0.45}[framing]
    if raised:
        upper = _track(rng, n, 0.25 * lively, rng.uniform(0.1, 1.3))
        fore = _track(rng, n, 0.5 * lively, rng.choice([rng.uniform(2.2, 3.9), rng.uniform(-1.6, -0.3)]))
    else:
        upper = _track(rng, n, 0.07 * lively, rng.uniform(0.02, 0.3))
        fore = _track(rng, n, 0.12 * lively, rng.uniform(-0.35, 0.2))
    length = np.clip(_track(rng, n, 0.05, rng.uniform(0.72, 1.0)), 0.6, 1.0)
    hand, curl = _track(rng, n, 0.25, 0.0, 0.6), np.clip(_track(rng, n, 0.3, 0.45, 0.5), 0.0, 1.6)
    spread = np.clip(_track(rng, n, 0.3, 0.5), 0, 1.2)
    return [ArmPose(*(float(v[i]) for v in (upper, fore, length, hand, curl, spread))) for i in range(n)]


def _body_tracks(rng: np.random.Generator, n: int, lively: float, framing: str) -> list[BodyPose]:
    right, left = _arm_tracks(rng, n, lively, framing), _arm_tracks(rng, n, lively, framing)
    lean = _track(rng, n, 0.06 * lively, rng.normal(0, 0.05))
    yaw = np.clip(_track(rng, n, 0.2 * lively, rng.normal(0, 0.25)), -0.8, 0.8)
    shrug = _track(rng, n, 0.7, 0.0), _track(rng, n, 0.7, 0.0)
    walk = rng.uniform(0.0, 0.35)
    stance = np.abs(_track(rng, n, walk * 0.6, 0.06)), np.abs(_track(rng, n, walk * 0.6, 0.06))
    knees = np.abs(_track(rng, n, walk * 0.5, 0.0)), np.abs(_track(rng, n, walk * 0.5, 0.0))
    return [
        BodyPose(
            float(lean[i]),
            float(yaw[i]),
            (float(shrug[0][i]), float(shrug[1][i])),
            right[i],
            left[i],
            (float(stance[0][i]), float(stance[1][i])),
            (float(knees[0][i]), float(knees[1][i])),
        )
        for i in range(n)
    ]


__all__ = ["MARGIN", "Person", "Pose", "caption", "sample_poses"]
