"""Concept in, steering operator out: the names for a notebook. Each is imported when it is first used.

An operator is the detached Jacobian of a decoder language model at a concept (J. R. Golden, "Equivalent Linear
Mappings of Large Language Models", TMLR 2025), stored as one file.

    from operators import BuildSpec, Setting, Store, build_operator, concept_from_text, load_model, steered

    model = load_model("smollm2-135m")
    concept = concept_from_text("The Golden Gate Bridge in San Francisco", model)
    operator = build_operator(BuildSpec((concept,), layer=15), model)
    print(operator.header.reconstruction_error)  # |sum_i J_i x_i + c - y| / |y|: the map gives back the hidden state
    store = Store("my-operators")
    store.save("golden-gate", operator)

    prompt = model.tokenizer("My favourite place is", return_tensors="pt")
    with steered(model, store.load("golden-gate"), Setting(strength=0.5, rule="cumulative", blend=0.0)):
        print(model.tokenizer.decode(model.model.generate(**prompt, max_new_tokens=30)[0]))

A model
    :func:`load_model`, :class:`LoadedModel`; :func:`recognise` wraps one that is in memory already.
Building
    :func:`concept_from_text`, :class:`Concept`, :class:`BuildSpec`, :func:`build_operator`; :func:`verify_operator`
    computes an operator anew and compares; :func:`combine` mixes several (:class:`WeightedOperator`).
Vectors
    :func:`read_vector_file` and :func:`import_vector` make operators of rank 0 from files of other programs;
    :func:`read_texts` and :func:`contrast_operator` from two sets of texts; :func:`export_gguf` writes anchors.
Words
    :func:`lens_matrices` and :func:`lens_artifact` make a lens, :func:`find_unembedding` and :func:`word_operator` an
    operator of any words; :func:`strength_within` is its strength for a budget of KL.
Calibration
    :func:`calibrate` finds layer, rule, blend and strength by trial; :class:`CalibrationSpec`,
    :func:`calibration_prompts`.
The linear map
    :func:`detached`, in whose ``with`` block gradients follow the detached rules; :func:`detached_jacobian` and
    :func:`ordinary_jacobian` (:class:`DenseMap`); :class:`Replay`, its products without its matrices;
    :func:`sketch` and :func:`embedding_root` (:class:`LowRankMap`); :class:`WeightedMap`; :func:`register` and
    :class:`Family` for another architecture.
Artifacts
    :class:`Store`; :class:`OperatorArtifact`, :class:`OperatorHeader`, :class:`Recommended`; :func:`read_artifact`
    verifies a file, :func:`read_file_header` reads what it says about itself (:class:`FileHeader`).
Steering
    :func:`steered`, :class:`Setting`, :class:`Positions`; below them :func:`prepare`, :class:`PreparedOperator`,
    :class:`Direction` and :func:`steer`, the steering equation.
Errors
    :class:`OperatorError` and its subclasses, drawn as a tree in :mod:`operators.core.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from operators.core.version import __version__

if TYPE_CHECKING:
    from operators.builder.build import build_operator
    from operators.builder.combine import WeightedOperator, combine
    from operators.builder.concept import Concept, concept_from_text
    from operators.builder.spec import BuildSpec
    from operators.builder.verify import verify_operator
    from operators.core.apply import Direction, PreparedOperator, Setting, prepare, steer
    from operators.core.artifact import OperatorArtifact, read_artifact
    from operators.core.budget import strength_within
    from operators.core.errors import (
        AnalysisError,
        ArtifactError,
        BuildError,
        ConceptError,
        ConceptFileError,
        IncompatibleOperatorError,
        ModelError,
        NameTakenError,
        OperatorError,
        OtherVersionError,
        ReconstructionError,
        SettingError,
        SteeringError,
        StoreError,
        TrialError,
        UnsupportedModelError,
        VectorError,
    )
    from operators.core.file_format import FileHeader, read_file_header
    from operators.core.header import OperatorHeader, Recommended
    from operators.core.positions import Positions
    from operators.core.store import Store
    from operators.lens.build import lens_artifact
    from operators.lens.matrices import lens_matrices
    from operators.maps.detach import Family, detached, register
    from operators.maps.jacobian import DenseMap, detached_jacobian, ordinary_jacobian
    from operators.maps.replay import Replay
    from operators.maps.sketch import LowRankMap, embedding_root, sketch
    from operators.maps.weighted_map import WeightedMap
    from operators.model.loading import LoadedModel, load_model, recognise
    from operators.model.steered import steered
    from operators.model.unembedding import find_unembedding
    from operators.model.words import word_operator
    from operators.tune.calibrate import calibrate
    from operators.tune.calibration_spec import CalibrationSpec
    from operators.tune.prompts import calibration_prompts
    from operators.vectors.contrast import contrast_operator, read_texts
    from operators.vectors.export import export_gguf
    from operators.vectors.imported import import_vector
    from operators.vectors.vector_file import read_vector_file

__all__ = [
    "AnalysisError",
    "ArtifactError",
    "BuildError",
    "BuildSpec",
    "CalibrationSpec",
    "Concept",
    "ConceptError",
    "ConceptFileError",
    "DenseMap",
    "Direction",
    "Family",
    "FileHeader",
    "IncompatibleOperatorError",
    "LoadedModel",
    "LowRankMap",
    "ModelError",
    "NameTakenError",
    "OperatorArtifact",
    "OperatorError",
    "OperatorHeader",
    "OtherVersionError",
    "Positions",
    "PreparedOperator",
    "Recommended",
    "ReconstructionError",
    "Replay",
    "Setting",
    "SettingError",
    "SteeringError",
    "Store",
    "StoreError",
    "TrialError",
    "UnsupportedModelError",
    "VectorError",
    "WeightedMap",
    "WeightedOperator",
    "__version__",
    "build_operator",
    "calibrate",
    "calibration_prompts",
    "combine",
    "concept_from_text",
    "contrast_operator",
    "detached",
    "detached_jacobian",
    "embedding_root",
    "export_gguf",
    "find_unembedding",
    "import_vector",
    "lens_artifact",
    "lens_matrices",
    "load_model",
    "ordinary_jacobian",
    "prepare",
    "read_artifact",
    "read_file_header",
    "read_texts",
    "read_vector_file",
    "recognise",
    "register",
    "sketch",
    "steer",
    "steered",
    "strength_within",
    "verify_operator",
    "word_operator",
]

# The same as above for the interpreter: `import operators` must not wait for torch.
_MODULES = {
    "builder.build": ("build_operator",),
    "builder.combine": ("WeightedOperator", "combine"),
    "builder.concept": ("Concept", "concept_from_text"),
    "builder.spec": ("BuildSpec",),
    "builder.verify": ("verify_operator",),
    "core.apply": ("Direction", "PreparedOperator", "Setting", "prepare", "steer"),
    "core.artifact": ("OperatorArtifact", "read_artifact"),
    "core.budget": ("strength_within",),
    "core.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "core.file_format": ("FileHeader", "read_file_header"),
    "core.header": ("OperatorHeader", "Recommended"),
    "core.positions": ("Positions",),
    "core.store": ("Store",),
    "lens.build": ("lens_artifact",),
    "lens.matrices": ("lens_matrices",),
    "maps.detach": ("Family", "detached", "register"),
    "maps.jacobian": ("DenseMap", "detached_jacobian", "ordinary_jacobian"),
    "maps.replay": ("Replay",),
    "maps.sketch": ("LowRankMap", "embedding_root", "sketch"),
    "maps.weighted_map": ("WeightedMap",),
    "model.loading": ("LoadedModel", "load_model", "recognise"),
    "model.steered": ("steered",),
    "model.unembedding": ("find_unembedding",),
    "model.words": ("word_operator",),
    "tune.calibrate": ("calibrate",),
    "tune.calibration_spec": ("CalibrationSpec",),
    "tune.prompts": ("calibration_prompts",),
    "vectors.contrast": ("contrast_operator", "read_texts"),
    "vectors.export": ("export_gguf",),
    "vectors.imported": ("import_vector",),
    "vectors.vector_file": ("read_vector_file",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    # From now on without this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
