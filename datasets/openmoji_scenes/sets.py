"""The table of data sets. A new set is one more record."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from .glyphs import Glyph, load_glyphs, pick_evenly

#: Goes into every manifest: raise it whenever the same parameters give other pixels or labels.
GENERATOR_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """One data set.

    Attributes:
        name: folder of the set; ``up_*`` for pre-training, ``down_*`` for transfer.
        kind: layout and supervision.
        groups: Unicode subgroups whose glyphs may occur; upstream and downstream share none.
        num_classes: that many classes of one glyph each, or 0: each group is a class.
        glyphs_per_class: when each group is a class, how many of its glyphs occur.
        train: number of training images.
        val: number of validation images.
        textures: backgrounds; in a segmentation set each but ``plain`` is a class.
        scale: smallest and largest longer side of an object, as a fraction of the image's side.
        rotation: largest turn of an object, in degrees either way.
        max_objects: most objects in an image (detection and segmentation).
        clutter: share of images with small glyphs of no class behind the object (classification).
        rendering: "colour", or a name in ``renderings``.
    """

    name: str
    kind: Literal["classification", "detection", "segmentation"]
    groups: tuple[str, ...]
    train: int
    val: int
    num_classes: int = 0
    glyphs_per_class: int = 1
    textures: tuple[str, ...]
    scale: tuple[float, float]
    rotation: float = 25.0
    max_objects: int = 6
    clutter: float = 0.0
    rendering: str = "colour"


_ANIMALS = ("animal-mammal", "animal-bird", "animal-reptile", "animal-marine", "animal-bug")
_PLANTS = ("plant-flower", "plant-other", "food-fruit", "food-vegetable")
_TRANSPORT = ("transport-ground", "transport-air", "transport-water")
_THINGS = ("tool", "household", "musical-instrument", "clothing", "sport", "light-video")
_UPSTREAM = (*_ANIMALS, *_PLANTS, *_TRANSPORT, "place-building", "sky-weather", *_THINGS)

_FOOD = ("food-prepared", "food-asian", "food-sweet", "drink")
_FACES = (
    *("face-smiling", "face-tongue", "face-affection", "face-hand", "face-neutral-skeptical", "face-concerned"),
    *("face-unwell", "face-negative", "face-costume", "face-hat", "face-glasses"),
)
_DESK = (
    *("computer", "phone", "office", "writing", "book-paper", "mail"),
    *("money", "lock", "science", "medical", "sound", "music"),
)
_PEOPLE = ("person", "person-role", "person-gesture", "person-fantasy", "person-activity", "person-sport")
_HANDS = ("hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "body-parts")
_SIGNS = ("transport-sign", "warning", "zodiac", "religion")
_PLACES = ("place-other", "place-geographic", "place-map", "place-religious")
_LEISURE = ("game", "event", "award-medal", "arts-crafts")

_SEEN = ("plain", "gradient", "stripes", "dots", "checker", "clouds", "grain")
_UNSEEN = ("plain", "waves", "rings", "bricks", "crosshatch", "cells")
_WIDE, _MEDIUM, _SMALL = (0.4, 0.85), (0.22, 0.5), (0.16, 0.35)

SETS: tuple[SetSpec, ...] = (
    # Upstream.
    SetSpec(
        name="up_cls", kind="classification", groups=_UPSTREAM, num_classes=60, train=2400, val=600,
        textures=_SEEN, scale=_WIDE, clutter=0.3,
    ),
    SetSpec(
        name="up_det", kind="detection", groups=_UPSTREAM, glyphs_per_class=2, train=1500, val=300,
        textures=_SEEN, scale=_MEDIUM,
    ),
    SetSpec(
        name="up_seg", kind="segmentation", groups=(*_ANIMALS, *_PLANTS, *_TRANSPORT), glyphs_per_class=3,
        train=1200, val=200, textures=("plain", "gradient", "stripes", "dots", "checker", "clouds"), scale=_MEDIUM,
        max_objects=5,
    ),
    # Downstream classification.
    SetSpec(
        name="down_cls_food", kind="classification", groups=_FOOD, num_classes=24, train=480, val=240,
        textures=_SEEN, scale=_WIDE, clutter=0.3,
    ),
    SetSpec(
        name="down_cls_faces", kind="classification", groups=_FACES, num_classes=20, train=500, val=300,
        textures=_SEEN, scale=_WIDE,
    ),
    SetSpec(
        name="down_cls_objects", kind="classification", groups=_DESK, glyphs_per_class=5, train=600, val=300,
        textures=_UNSEEN, scale=_WIDE,
    ),
    SetSpec(
        name="down_cls_lineart", kind="classification", groups=_HANDS, num_classes=20, train=500, val=300,
        textures=_UNSEEN, scale=_WIDE, rendering="line_art",
    ),
    # Downstream detection and instance segmentation.
    SetSpec(
        name="down_det_food", kind="detection", groups=_FOOD, num_classes=10, train=400, val=200,
        textures=_SEEN, scale=_MEDIUM,
    ),
    SetSpec(
        name="down_det_people", kind="detection", groups=_PEOPLE, glyphs_per_class=3, train=500, val=200,
        textures=_UNSEEN, scale=(0.25, 0.5), max_objects=8,
    ),
    SetSpec(
        name="down_det_signs", kind="detection", groups=_SIGNS, num_classes=10, train=400, val=200,
        textures=_SEEN, scale=_SMALL, rendering="noisy",
    ),
    SetSpec(
        name="down_det_lineart", kind="detection", groups=_DESK, num_classes=8, train=400, val=200,
        textures=_UNSEEN, scale=_MEDIUM, max_objects=5, rendering="line_art",
    ),
    # Downstream semantic segmentation.
    SetSpec(
        name="down_seg_food", kind="segmentation", groups=_FOOD, glyphs_per_class=3, train=400, val=200,
        textures=("plain", "waves", "bricks", "cells"), scale=_MEDIUM, max_objects=5,
    ),
    SetSpec(
        name="down_seg_faces", kind="segmentation", groups=_FACES, num_classes=6, train=400, val=200,
        textures=("plain", "rings", "crosshatch"), scale=_MEDIUM, max_objects=5, rendering="blurred",
    ),
    SetSpec(
        name="down_seg_places", kind="segmentation", groups=_PLACES, num_classes=8, train=400, val=200,
        textures=("plain", "waves", "crosshatch", "cells"), scale=_MEDIUM, max_objects=5, rendering="inverted",
    ),
    SetSpec(
        name="down_seg_leisure", kind="segmentation", groups=_LEISURE, glyphs_per_class=2, train=400, val=200,
        textures=("plain", "rings", "bricks", "waves"), scale=_MEDIUM, max_objects=5, rendering="grey",
    ),
)  # fmt: skip


@cache
def object_classes(spec: SetSpec) -> dict[str, tuple[Glyph, ...]]:
    """The glyphs of each class, by name; sorted, as readers of image folders sort."""
    groups = load_glyphs()
    if spec.num_classes:
        glyphs = [glyph for group in spec.groups for glyph in groups[group]]
        picked = {glyph.name: pick_evenly([glyph], 1) for glyph in pick_evenly(glyphs, spec.num_classes)}
    else:
        picked = {group.replace("-", "_"): pick_evenly(groups[group], spec.glyphs_per_class) for group in spec.groups}
    return dict(sorted(picked.items()))


@cache
def clutter_glyphs(spec: SetSpec) -> tuple[Glyph, ...]:
    """The glyphs of the set's groups that belong to none of its classes."""
    used = {glyph for glyphs in object_classes(spec).values() for glyph in glyphs}
    return tuple(glyph for group in spec.groups for glyph in load_glyphs()[group] if glyph not in used)


def stuff_classes(spec: SetSpec) -> tuple[str, ...]:
    """The background classes of a segmentation set; ``plain`` is called background and comes first."""
    return ("background", *(texture for texture in spec.textures if texture != "plain"))


def class_names(spec: SetSpec) -> list[str]:
    """Class names in order of their index."""
    things = list(object_classes(spec))
    return [*stuff_classes(spec), *things] if spec.kind == "segmentation" else things
