"""A bundle's signature with a key, offline: model-signing (OpenSSF) over the digests of all files, kept beside the bundle."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from cswap_deploy.errors import UsageError, VerifyError, reason, require_module

SUFFIX = ".sig"
"""`<work>/bundle.sig` belongs to `<work>/bundle`: a signature cannot lie in what it signs."""


def beside(folder: Path) -> Path:
    return folder.with_name(folder.name + SUFFIX)


def require(key: Path) -> None:
    """Before the long stages rather than after. Errors: UsageError."""
    require_module("model_signing", "signing")
    if not key.is_file():
        raise UsageError(
            f"sign: there is no file {key}", "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        )
    try:
        with TemporaryDirectory() as folder:
            _public(key, Path(folder) / "public.pem")
    except Exception as error:  # of the cryptography library, whatever a file makes it stumble over
        raise UsageError(
            f"sign: {key.name} is no private key on a curve, in PEM and without a password: {reason(error)}",
            "openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
        ) from error


def sign(folder: Path, key: Path) -> Path:
    """The signature's path; one that fits already stays as it is, since no two signatures are alike."""
    from model_signing.signing import Config

    signature = beside(folder)
    with TemporaryDirectory() as scratch:
        public = Path(scratch) / "public.pem"
        _public(key, public)
        try:
            check(folder, signature, public)
        except VerifyError:
            signer = Config()  # type: ignore[no-untyped-call]
            signer.use_elliptic_key_signer(private_key=key).sign(folder, signature)
    return signature


def check(folder: Path, signature: Path, public_key: Path) -> None:
    """Every file of the bundle is as it was when the owner of the key signed it. Errors: VerifyError, UsageError."""
    require_module("model_signing", "signing")
    from model_signing.verifying import Config

    if not public_key.is_file():
        raise UsageError(f"there is no file {public_key}", "give the public key of the one who signed, in PEM")
    if not signature.is_file():
        raise VerifyError(
            f"there is no signature {signature.name} beside the bundle", "ask for it, or build with sign:"
        )
    try:
        verifier = Config()  # type: ignore[no-untyped-call]
        verifier.use_elliptic_key_verifier(public_key=public_key).verify(folder, signature)
    except Exception as error:  # ValueError for a file that differs, cryptography's own for another key
        raise VerifyError(
            f"the signature does not hold: {reason(error)}", "ask who signed it for both again"
        ) from error


def _public(key: Path, path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    private = serialization.load_pem_private_key(key.read_bytes(), None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise ValueError("it is a key of another kind")
    form, pem = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.Encoding.PEM
    path.write_bytes(private.public_key().public_bytes(pem, form))
