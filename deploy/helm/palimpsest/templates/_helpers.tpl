{{- define "palimpsest.name" -}}
{{- if contains "palimpsest" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-palimpsest" (.Release.Name | trunc 29 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "palimpsest.selector" -}}
app.kubernetes.io/name: palimpsest
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "palimpsest.labels" -}}
{{ include "palimpsest.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "palimpsest.runId" -}}
{{ .Values.runId | default .Release.Name }}
{{- end }}

{{/* Ports. The run file may set others for one machine; in the cluster each service has its own address. */}}
{{- define "palimpsest.ports" -}}
{store: 7701, gateway: 7702, rollout: 7703, learner: 7704, replica: 7705, rendezvous: 29500, minio: 9000}
{{- end }}

{{- define "palimpsest.image" -}}
{{- if .image.digest }}{{ .image.repository }}@{{ .image.digest }}{{ else }}{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{/* URL of the S3, and of the store, as the pods reach them. */}}
{{- define "palimpsest.endpoint" -}}
{{- if eq .Values.objectStore.mode "minio" }}http://{{ include "palimpsest.name" . }}-minio:{{ (include "palimpsest.ports" . | fromYaml).minio }}{{ else }}{{ .Values.objectStore.endpoint }}{{ end }}
{{- end }}

{{- define "palimpsest.kafkaServers" -}}
{{- if eq .Values.kafka.mode "strimzi" }}{{ .Values.kafka.strimzi.cluster }}-kafka-bootstrap:9093{{ else }}{{ .Values.kafka.servers }}{{ end }}
{{- end }}

{{/* Fields of a pod that all components have in common. Arguments: root, component, values. */}}
{{- define "palimpsest.pod" -}}
serviceAccountName: {{ include "palimpsest.name" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .values.terminationGracePeriodSeconds }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "palimpsest.containerSecurity" -}}
# a program writes the sentence of its error there; a crash leaves the end of its log
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* Requests and limits, with the GPUs. */}}
{{- define "palimpsest.resources" -}}
{{- $requests := deepCopy .resources.requests }}
{{- $limits := deepCopy .resources.limits }}
{{- with .gpu }}
{{- if .count }}
{{- $_ := set $requests .resource .count }}
{{- $_ := set $limits .resource .count }}
{{- end }}
{{- end }}
resources:
  requests:
    {{- toYaml $requests | nindent 4 }}
  limits:
    {{- toYaml $limits | nindent 4 }}
{{- end }}

{{/* Probes. Arguments: port, values. A service answers /healthz as soon as its program starts. */}}
{{- define "palimpsest.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ max 1 (div (int .startupSeconds) 5) }}
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 10
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 10
  timeoutSeconds: 10
{{- end }}

{{/* The variables of every service: names, addresses, folders. */}}
{{- define "palimpsest.env" -}}
{{- $ports := include "palimpsest.ports" . | fromYaml }}
- name: PALIMPSEST_RUN__ID
  value: {{ include "palimpsest.runId" . | quote }}
- name: PALIMPSEST_RUN__FOLDER
  value: /runs
- name: PALIMPSEST_BUS__KIND
  value: kafka
- name: PALIMPSEST_BUS__SERVERS
  value: {{ include "palimpsest.kafkaServers" . | quote }}
{{- if eq .Values.kafka.mode "strimzi" }}
- name: PALIMPSEST_BUS__SECURITY
  value: sasl_tls
- name: PALIMPSEST_BUS__SASL_MECHANISM
  value: SCRAM-SHA-512
{{- end }}
- name: PALIMPSEST_SNAPSHOT_STORE__STORAGE
  value: s3
- name: PALIMPSEST_SNAPSHOT_STORE__ENDPOINT
  value: {{ include "palimpsest.endpoint" . | quote }}
- name: PALIMPSEST_SNAPSHOT_STORE__BUCKET
  value: {{ .Values.objectStore.bucket | quote }}
{{- if eq .Values.objectStore.mode "minio" }}
- name: PALIMPSEST_SNAPSHOT_STORE__CREATE_BUCKET
  value: "true"
{{- end }}
- name: PALIMPSEST_SNAPSHOT_STORE__URL
  value: http://{{ include "palimpsest.name" . }}-store:{{ $ports.store }}
- name: PALIMPSEST_ENV_GATEWAY__URL
  value: http://{{ include "palimpsest.name" . }}-gateway:{{ $ports.gateway }}
{{- if or .Values.model.claim .Values.model.image }}
- name: PALIMPSEST_MODEL__PATH
  value: {{ printf "/model/%s" .Values.model.subPath | trimSuffix "/" | quote }}
{{- end }}
- name: HOME
  value: /tmp
{{- end }}

{{/* Variables of the services that use the log: credentials and CA certificates. */}}
{{- define "palimpsest.kafkaEnv" -}}
{{- if eq .Values.kafka.mode "strimzi" }}
- name: PALIMPSEST_KAFKA_USERNAME
  value: {{ include "palimpsest.name" . }}
- name: PALIMPSEST_KAFKA_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "palimpsest.name" . }}
      key: password
- name: PALIMPSEST_BUS__CA_FILE
  value: /etc/palimpsest/kafka/ca.crt
{{- else }}
{{- with .Values.kafka.credentialsSecret }}
{{- if .name }}
- name: PALIMPSEST_KAFKA_USERNAME
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .usernameKey }}
- name: PALIMPSEST_KAFKA_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .passwordKey }}
{{- end }}
{{- end }}
{{- if .Values.kafka.caSecret.name }}
- name: PALIMPSEST_BUS__CA_FILE
  value: /etc/palimpsest/kafka/ca.crt
{{- end }}
{{- end }}
{{- end }}

{{- define "palimpsest.objectStoreEnv" -}}
{{- if .Values.objectStore.caSecret.name }}
- name: PALIMPSEST_SNAPSHOT_STORE__CA_FILE
  value: /etc/palimpsest/s3/ca.crt
{{- end }}
{{- end }}

{{- define "palimpsest.serviceToken" -}}
- name: PALIMPSEST_SERVICE_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.gateway.tokenSecret.name }}
      key: {{ .Values.gateway.tokenSecret.key }}
{{- if .Values.access.tokensSecret.name }}
- name: PALIMPSEST_TOKENS_FILE
  value: /etc/palimpsest/tokens/tokens
{{- end }}
{{- end }}

{{/* Mounts and volumes. Arguments: root, kafka, s3, model, runs (a claim's name or empty), shm. */}}
{{- define "palimpsest.mounts" -}}
volumeMounts:
  - {name: run, mountPath: /etc/palimpsest/run, readOnly: true}
  - {name: tmp, mountPath: /tmp}
  - {name: runs, mountPath: /runs}
  {{- if .root.Values.access.tokensSecret.name }}
  - {name: tokens, mountPath: /etc/palimpsest/tokens, readOnly: true}
  {{- end }}
  {{- if .shm }}
  - {name: shm, mountPath: /dev/shm}
  {{- end }}
  {{- if and .model (or .root.Values.model.claim .root.Values.model.image) }}
  - {name: model, mountPath: /model, readOnly: true}
  {{- end }}
  {{- if and .kafka (include "palimpsest.kafkaCa" .root) }}
  - {name: kafka-ca, mountPath: /etc/palimpsest/kafka, readOnly: true}
  {{- end }}
  {{- if and .s3 .root.Values.objectStore.caSecret.name }}
  - {name: s3-ca, mountPath: /etc/palimpsest/s3, readOnly: true}
  {{- end }}
{{- end }}

{{- define "palimpsest.kafkaCa" -}}
{{- if eq .Values.kafka.mode "strimzi" }}{{ .Values.kafka.strimzi.cluster }}-cluster-ca-cert{{ else }}{{ .Values.kafka.caSecret.name }}{{ end }}
{{- end }}

{{- define "palimpsest.volumes" -}}
volumes:
  - name: run
    configMap:
      name: {{ include "palimpsest.name" .root }}-run
  - name: tmp
    emptyDir: {}
  - name: runs
    {{- if .runs }}
    persistentVolumeClaim:
      claimName: {{ .runs }}
    {{- else }}
    emptyDir: {}
    {{- end }}
  {{- with .root.Values.access.tokensSecret }}
  {{- if .name }}
  - name: tokens
    secret:
      secretName: {{ .name }}
      items:
        - {key: {{ .key }}, path: tokens}
  {{- end }}
  {{- end }}
  {{- if .shm }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ .shm }}
  {{- end }}
  {{- if .model }}
  {{- with .root.Values.model.claim }}
  - name: model
    persistentVolumeClaim:
      claimName: {{ . }}
      readOnly: true
  {{- end }}
  {{- with .root.Values.model.image }}
  - name: model
    image:
      reference: {{ . | quote }}
      pullPolicy: IfNotPresent
  {{- end }}
  {{- end }}
  {{- if .kafka }}
  {{- with include "palimpsest.kafkaCa" .root }}
  - name: kafka-ca
    secret:
      secretName: {{ . }}
      items:
        - {key: {{ if eq $.root.Values.kafka.mode "strimzi" }}ca.crt{{ else }}{{ $.root.Values.kafka.caSecret.key }}{{ end }}, path: ca.crt}
  {{- end }}
  {{- end }}
  {{- if .s3 }}
  {{- with .root.Values.objectStore.caSecret }}
  {{- if .name }}
  - name: s3-ca
    secret:
      secretName: {{ .name }}
      items:
        - {key: {{ .key }}, path: ca.crt}
  {{- end }}
  {{- end }}
  {{- end }}
{{- end }}

{{/* What a Job does when a pod fails; docs/operations.md lists the exit codes. Argument: the container's name. */}}
{{- define "palimpsest.podFailurePolicy" -}}
podFailurePolicy:
  rules:
    # an eviction, a preemption or a lost node is not a failure of the run
    - action: Ignore
      onPodConditions:
        - {type: DisruptionTarget, status: "True"}
    # a restart would exit in the same way: configuration, damaged data, canary, replaced; 7: a person stopped the run
    - action: FailJob
      onExitCodes:
        containerName: {{ . }}
        operator: In
        values: [2, 4, 5, 6, 7]
    # a clean stop after SIGTERM
    - action: Ignore
      onExitCodes:
        containerName: {{ . }}
        operator: In
        values: [130]
{{- end }}

{{/* Name of the Job of rank 0. A JobSet names its Jobs by the JobSet, the replicated Job and its index. */}}
{{- define "palimpsest.rank0Job" -}}
{{ include "palimpsest.name" . }}-learner-{{ .Values.learner.jobSet.enabled | ternary "node-0-0" "0" }}
{{- end }}

{{/* Labels of an object that Kueue queues. */}}
{{- define "palimpsest.queue" -}}
{{- with .Values.kueue }}
{{- if .queueName }}
kueue.x-k8s.io/queue-name: {{ .queueName }}
{{- with .priorityClass }}
kueue.x-k8s.io/priority-class: {{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* `suspend` of an object that Kueue starts. Arguments: root, version, kind, name. Helm resets what others changed, so an
upgrade must render what it finds: it would suspend the pods of a run that Kueue has started. */}}
{{- define "palimpsest.suspend" -}}
{{- if .root.Values.kueue.queueName }}
{{- $live := lookup .version .kind .root.Release.Namespace .name }}
suspend: {{ if $live }}{{ dig "spec" "suspend" false $live }}{{ else }}true{{ end }}
{{- end }}
{{- end }}
