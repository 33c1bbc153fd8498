{{- /* The spec of the Job of one node. Arguments: root, node. */}}
{{- define "palimpsest.learnerJob" -}}
{{- $root := .root }}
{{- $node := .node }}
{{- $values := $root.Values.learner }}
{{- $name := printf "%s-learner" (include "palimpsest.name" $root) }}
{{- $ports := include "palimpsest.ports" $root | fromYaml }}
{{- $claim := $values.volume.existingClaim | default $name }}
{{- $labels := dict "root" $root "component" "learner" }}
{{- $volumes := dict "root" $root "kafka" true "s3" true "model" true "shm" $values.shm "runs" (ternary $claim "" (or $values.volume.shared (eq $node 0))) }}
completionMode: Indexed
completions: 1
parallelism: 1
backoffLimit: {{ $values.jobSet.enabled | ternary 0 $values.backoffLimit }}
podReplacementPolicy: Failed
{{- include "palimpsest.podFailurePolicy" "learner" | nindent 0 }}
template:
  metadata:
    labels:
      {{- include "palimpsest.labels" $labels | nindent 6 }}
      palimpsest/node: {{ $node | quote }}
    {{- with $values.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    restartPolicy: Never
    subdomain: {{ $name }}
    {{- include "palimpsest.pod" (dict "root" $root "values" $values) | nindent 4 }}
    containers:
      - name: learner
        image: {{ include "palimpsest.image" (dict "root" $root "image" $root.Values.images.gpu) | quote }}
        imagePullPolicy: {{ $root.Values.images.gpu.pullPolicy }}
        command:
          - python
          {{- if gt (mul $values.nodes $values.ranksPerNode) 1 }}
          - -m
          - palimpsest.services.learner.torchrun
          {{- if gt (int $values.nodes) 1 }}
          - --nnodes={{ $values.nodes }}
          - --node-rank={{ $node }}
          - --master-addr={{ include "palimpsest.rank0Job" $root }}-0.{{ $name }}.{{ $root.Release.Namespace }}.svc
          - --master-port={{ $ports.rendezvous }}
          {{- else }}
          - --standalone
          {{- end }}
          - --nproc-per-node={{ $values.ranksPerNode }}
          {{- end }}
          - -m
          - palimpsest.services.learner
          - /etc/palimpsest/run/run.toml
        env:
          {{- include "palimpsest.env" $root | nindent 10 }}
          {{- include "palimpsest.kafkaEnv" $root | nindent 10 }}
          {{- include "palimpsest.objectStoreEnv" $root | nindent 10 }}
          {{- include "palimpsest.serviceToken" $root | nindent 10 }}
          - name: PALIMPSEST_LEARNER__HOST
            value: {{ $root.Values.listen | quote }}
          - name: PALIMPSEST_LEARNER__PORT
            value: {{ $ports.learner | quote }}
          {{- with $values.extraEnv }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        ports:
          - {name: http, containerPort: {{ $ports.learner }}}
          - {name: rendezvous, containerPort: {{ $ports.rendezvous }}}
        {{- if eq $node 0 }}
        {{- /* rank 0 alone has a server */}}
        {{- include "palimpsest.probes" $values | nindent 8 }}
        {{- end }}
        {{- include "palimpsest.containerSecurity" . | nindent 8 }}
        {{- include "palimpsest.resources" $values | nindent 8 }}
        {{- include "palimpsest.mounts" $volumes | nindent 8 }}
    {{- include "palimpsest.volumes" $volumes | nindent 4 }}
{{- end }}
