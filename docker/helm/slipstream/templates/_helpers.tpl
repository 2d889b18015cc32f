{{- define "slipstream.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 58 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 58 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "slipstream.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "slipstream.labels" -}}
{{ include "slipstream.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "slipstream.metadata" -}}
name: {{ include "slipstream.name" . }}
labels:
  {{- include "slipstream.labels" . | nindent 2 }}
{{- end -}}

{{- define "slipstream.serviceAccount" -}}
{{- .Values.serviceAccount.existing | default (include "slipstream.name" .) -}}
{{- end -}}

{{- define "slipstream.secret" -}}
{{- .Values.secret.existing | default (include "slipstream.name" .) -}}
{{- end -}}

{{- define "slipstream.claim" -}}
{{- .Values.data.existingClaim | default (printf "%s-data" (include "slipstream.name" .)) -}}
{{- end -}}

{{/* Whether /data can be mounted by one node only. */}}
{{- define "slipstream.oneNode" -}}
{{- if and .Values.data.enabled (ne .Values.data.accessMode "ReadWriteMany") -}}yes{{- end -}}
{{- end -}}

{{- define "slipstream.strategy" -}}
{{- .Values.strategy | default (ternary "Recreate" "RollingUpdate" (eq (include "slipstream.oneNode" .) "yes")) -}}
{{- end -}}

{{/* One argument. Kubernetes takes $$ for $, and $(NAME) for a variable. */}}
{{- define "slipstream.argument" -}}
- {{ replace "$" "$$" . | quote }}
{{- end -}}

{{/* The options as arguments. Numbers go through toJson, because Helm knows them as floats and writes 1e+06. */}}
{{- define "slipstream.arguments" -}}
{{- $options := .Values.options -}}
{{- if and .Values.gpu.count (not (hasKey $options "device")) -}}
{{- $options = merge (dict "device" "cuda") $options -}}
{{- end -}}
- serve
{{- range $name, $value := $options }}
{{- if kindIs "bool" $value }}
- --{{ ternary "" "no-" $value }}{{ $name }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
{{ include "slipstream.argument" (printf "--%s=%s" $name .) }}
{{- end }}
{{- else if kindIs "string" $value }}
{{ include "slipstream.argument" (printf "--%s=%s" $name $value) }}
{{- else }}
- --{{ $name }}={{ toJson $value }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Seconds from the end of a pod's service to SIGKILL: the pause, the drain, and time for processes to write and end. */}}
{{- define "slipstream.graceSeconds" -}}
{{- add .Values.preStopSeconds (index .Values.options "drain-timeout-s" | ceil | int) 30 -}}
{{- end -}}

{{/* /health is 503 from the stall to the end of the start of the engine that replaces the hanging one. */}}
{{- define "slipstream.livenessSeconds" -}}
{{- $hang := subf (index .Values.options "engine-hang-s") (index .Values.options "health-stall-s") -}}
{{- addf .Values.health.startSeconds (maxf $hang 0) | ceil | int -}}
{{- end -}}
