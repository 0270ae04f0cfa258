"""Makes ``twistd pulsar-api`` known; imports nothing of ours."""

from twisted.application.service import ServiceMaker

serviceMaker = ServiceMaker(
    "pulsar-api",
    "pulsar_api.tap",
    "Run deployment and operations tasks over HTTP.",
    "pulsar-api",
)
