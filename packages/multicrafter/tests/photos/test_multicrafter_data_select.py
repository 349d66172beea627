"""Who may be used: every answer of the metadata under every switch, and whose answer counts for a face."""

from __future__ import annotations

import numpy as np
import pytest
from multicrafter.photos.config import FilterConfig, PrivacyConfig
from multicrafter.photos.people import Face
from multicrafter.photos.scan import PersonNote, PhotoNote
from multicrafter.photos.select import Photo, forbidden, person_note, sort_faces

OPEN, STRICT = PrivacyConfig(), PrivacyConfig(require_consent=True)


@pytest.mark.parametrize(
    ("privacy", "allowed"),
    [
        (OPEN, {("yes", "no"), ("yes", "unknown"), ("unknown", "no"), ("unknown", "unknown")}),
        (PrivacyConfig(minors="drop_unknown"), {("yes", "no"), ("unknown", "no")}),
        (PrivacyConfig(minors="keep"), {(c, m) for c in ("yes", "unknown") for m in ("yes", "no", "unknown")}),
        (STRICT, {("yes", "no"), ("yes", "unknown")}),
        (PrivacyConfig(require_consent=True, minors="drop_unknown"), {("yes", "no")}),
        (PrivacyConfig(require_consent=True, minors="keep"), {("yes", m) for m in ("yes", "no", "unknown")}),
    ],
)
def test_every_answer_under_every_switch(privacy, allowed):
    answers = ("yes", "no", "unknown")
    assert {(c, m) for c in answers for m in answers if forbidden(c, m, privacy) is None} == allowed


def face(left: float, number: int = 0) -> Face:
    box = (left, 10.0, left + 20, 30.0)
    return Face(number, box, box, 1.0, np.ones(4) / 2)


def person(left: float, **answers: str) -> PersonNote:
    return PersonNote(box=(left - 10, 0, left + 30, 90), **answers)


def test_the_person_around_a_face_answers_before_the_photo():
    note = PhotoNote(consent="yes", minor="no", people=(person(100, consent="no"), person(200, minor="yes")))
    assert person_note(face(100), note) == ("no", "no")
    assert person_note(face(200), note) == ("yes", "yes")
    assert person_note(face(300), note) == ("yes", "no")  # nobody noted is there: the photo's answer
    assert person_note(face(100), PhotoNote(consent="no", people=(person(100, consent="yes"),))) == ("yes", "unknown")


def test_who_may_not_be_seen_is_hidden_even_where_no_face_was_found():
    note = PhotoNote(consent="yes", people=(person(100, consent="no"), person(300, minor="yes")))
    photo = Photo("a.jpg", "a", 400, 100, 0, 1.0, note, "own", faces=[face(100, 0), face(200, 1)])
    drops = sort_faces(photo, FilterConfig(min_face_pixels=4), OPEN)
    assert [f.number for f in photo.usable] == [1]
    assert photo.hidden == [face(100).box, person(300).box]
    assert [(d.reason, d.face) for d in drops] == [("consent refused", 0), ("minor", None)]
